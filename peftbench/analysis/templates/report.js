"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const narrow = () => window.innerWidth < 640;
  const QUALITY = { test: "test score", validation: "validation score" };
  const COSTS = {
    adapter_parameters: ["adapter parameters", "count"],
    trainable_parameters: ["all trained parameters", "count"],
    step_seconds: ["training step, median", "seconds"],
    memory_bytes: ["peak memory", "bytes"],
    energy_joules: ["energy per 1000 tokens", "joules"],
    checkpoint_bytes: ["checkpoint", "bytes"],
  };
  const KINDS = { cuda: "peak VRAM", tracked_tensors: "peak memory (tracked tensors)" };
  const UNITS = {
    count: [[1e9, "B"], [1e6, "M"], [1e3, "k"], [1, ""]],
    seconds: [[1, " s"], [1e-3, " ms"], [1e-6, " µs"]],
    bytes: [[2 ** 30, " GiB"], [2 ** 20, " MiB"], [2 ** 10, " KiB"], [1, " B"]],
    joules: [[1e3, " kJ"], [1, " J"], [1e-3, " mJ"]],
  };
  const MISSING = "–";
  const dark = () => matchMedia("(prefers-color-scheme: dark)").matches;
  const ON_DARK = { "#882255": "#F0E442" }; // too dim there: Okabe and Ito's yellow

  // -- what lies in the page ------------------------------------------------------------------------------------------

  async function unzipped(id) {
    const text = atob($(id).textContent);
    const bytes = Uint8Array.from(text, (c) => c.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  }
  const kept = {};
  const blob = (name) => (kept[name] ??= unzipped("data-" + name).then(JSON.parse));
  let drawing = null;
  const plotly = () =>
    (drawing ??= unzipped("data-plotly").then((text) => {
      const script = document.createElement("script");
      script.textContent = text;
      document.head.append(script);
      return window.Plotly;
    }));
  const rowsOf = ({ keys, rows }) => rows.map((row) => Object.fromEntries(keys.map((key, i) => [key, row[i]])));
  const unique = (values) => [...new Set(values)];
  const escaped = (text) => String(text).replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);

  // -- numbers for people ---------------------------------------------------------------------------------------------

  function human(value, unit) {
    if (value === null || value === undefined) return MISSING;
    if (!UNITS[unit]) return String(Number(value.toPrecision(4)));
    const [scale, suffix] = UNITS[unit].find(([s]) => Math.abs(value) >= s * 0.9995) ?? UNITS[unit].at(-1);
    return (value === 0 ? "0" : String(Number((value / scale).toPrecision(3)))) + suffix;
  }
  const score = (mean, spread) =>
    mean === null || mean === undefined
      ? MISSING
      : (mean.toFixed(Math.abs(mean) >= 10 ? 1 : 3) + (spread === null || spread === undefined ? "" : " ± " + spread.toFixed(Math.abs(mean) >= 10 ? 1 : 3))).replaceAll("-", "−");

  /** Ticks of an axis of costs; zero has a place of its own left of a logarithmic one. */
  function scale(values, unit) {
    const positive = values.filter((v) => v > 0);
    const low = Math.min(...positive), high = Math.max(...positive);
    const log = positive.length > 0 && high / low > 8;
    if (!log) {
      const [factor, suffix] = UNITS[unit].find(([s]) => high >= s * 0.999) ?? UNITS[unit].at(-1);
      return { place: (v) => v / factor, axis: { type: "linear", rangemode: low < high / 3 ? "tozero" : "normal" }, suffix: suffix.trim() };
    }
    const zero = low / 10 ** Math.max(0.5, 0.16 * Math.log10(high / low));
    const base = unit === "bytes" ? 4 : 10;
    const [first, last] = [Math.floor(Math.log(low) / Math.log(base)), Math.ceil(Math.log(high) / Math.log(base))];
    const every = Math.max(1, Math.ceil((last - first) / (narrow() ? 4 : 7)));
    let ticks = [];
    for (let k = first; k <= last; k += every) ticks.push(base ** k);
    if (last - first < 3 && base === 10) ticks = ticks.flatMap((t) => [t, 2 * t, 5 * t]);
    ticks = ticks.filter((t) => t >= low / 1.6 && t <= high * 1.6);
    const zeros = values.some((v) => v === 0);
    if (zeros) ticks = ticks.filter((t) => t > zero * 2);
    return {
      place: (v) => (v > 0 ? v : zero),
      axis: { type: "log", tickvals: zeros ? [zero, ...ticks] : ticks, ticktext: [...(zeros ? ["0"] : []), ...ticks.map((t) => human(t, unit))] },
      suffix: "",
    };
  }

  // -- pieces of the page ---------------------------------------------------------------------------------------------

  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) {
      if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
      else if (value !== null && value !== undefined && value !== false) made.setAttribute(key, value);
    }
    made.append(...children.map((child) => child ?? MISSING));
    return made;
  }

  /** A table of texts, or of nodes; `text` leading columns are aligned left. */
  function table(caption, headers, rows, text = 1) {
    const name = "t" + Math.random().toString(36).slice(2);
    const body = rows.map((row) =>
      element("tr", {}, ...row.map((cell, i) => (i === 0 ? element("th", { scope: "row" }, cell) : element("td", { class: i >= text ? "n" : null }, cell)))),
    );
    const made = element(
      "table",
      { class: "sortable" },
      element("caption", { id: name }, element("span", {}, caption)),
      element("thead", {}, element("tr", {}, ...headers.map((h, i) => element("th", { scope: "col", class: i >= text ? "n" : null }, h)))),
      element("tbody", {}, ...body),
    );
    sortable(made);
    return element("div", { class: "scroll tall", role: "region", tabindex: "0", "aria-labelledby": name }, made);
  }

  const MULTIPLES = { k: 1e3, M: 1e6, B: 1e9, " KiB": 2 ** 10, " MiB": 2 ** 20, " GiB": 2 ** 30, " ms": 1e-3, " µs": 1e-6, " kJ": 1e3, " mJ": 1e-3 };
  function merit(cell) {
    const text = cell.textContent.trim().replaceAll("−", "-");
    const found = text.match(/^\[?([+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?)( ?[A-Za-zµ]+)?/);
    return found ? Number(found[1]) * (MULTIPLES[found[2]] ?? 1) : null;
  }
  function sortable(made) {
    made.querySelectorAll("thead th").forEach((header, column) => {
      const button = element("button", { type: "button" }, header.textContent);
      header.replaceChildren(button);
      button.addEventListener("click", () => {
        const numeric = header.classList.contains("n");
        const now = header.getAttribute("aria-sort");
        const next = now === "descending" ? "ascending" : now === "ascending" ? "descending" : numeric ? "descending" : "ascending";
        made.querySelectorAll("thead th").forEach((other) => other.removeAttribute("aria-sort"));
        header.setAttribute("aria-sort", next);
        const sign = next === "ascending" ? 1 : -1;
        const body = made.tBodies[0];
        const keyed = [...body.rows].map((row) => [numeric ? merit(row.cells[column]) : row.cells[column].textContent, row]);
        keyed.sort(([a], [b]) => (a === null) - (b === null) || sign * (numeric ? a - b : a.localeCompare(b, "en", { numeric: true })));
        body.append(...keyed.map(([, row]) => row));
      });
    });
  }

  function fill(select, options, chosen) {
    select.replaceChildren(...options.map(([value, text]) => element("option", { value, selected: value === chosen ? "" : null }, text)));
    select.closest("label").hidden = options.length < 2;
    if (options.length < 2) select.closest("label").style.display = "none";
  }
  const everything = (values, what) => (values.length > 1 ? [["", `all ${what}`], ...values.map((v) => [String(v), String(v)])] : values.map((v) => [String(v), String(v)]));

  function copyable(text) {
    const status = element("span", { role: "status" }, "");
    const button = element("button", { type: "button", onclick: async () => {
      try {
        await navigator.clipboard.writeText(text);
        status.textContent = " copied";
      } catch {
        getSelection().selectAllChildren(shown);
        status.textContent = " selected: copy it with the keyboard";
      }
    } }, "copy");
    const shown = element("pre", { tabindex: "0", "aria-label": "Command" }, text);
    return element("div", {}, shown, button, status);
  }

  /** A command for a hover text; of one for each of several tasks the first. */
  function commandLines(text) {
    const lines = text.split("\n");
    return ["", wrapped(lines[0], narrow() ? 38 : 72), ...(lines.length > 1 ? [`and ${lines.length - 1} more: select the point`] : [])];
  }
  const wrapped = (text, width) =>
    String(text).split("\n").map((line) => line.split(" ").reduce((lines, word) => {
      if (lines.length && (lines.at(-1) + " " + word).length <= width) lines[lines.length - 1] += " " + word;
      else lines.push(word);
      return lines;
    }, []).map(escaped).join("<br>  ")).join("<br>");

  // -- charts ---------------------------------------------------------------------------------------------------------

  const charts = {}; // name → how to draw it
  const seen = new Set();
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function layout(more) {
    const axis = { gridcolor: css("--line"), linecolor: css("--soft"), zerolinecolor: css("--line"), automargin: true };
    const merged = {
      font: { family: "system-ui, sans-serif", size: 12, color: css("--ink") },
      paper_bgcolor: css("--page"),
      plot_bgcolor: css("--page"),
      margin: { l: narrow() ? 48 : 64, r: 12, t: 12, b: 48 },
      hovermode: "closest",
      hoverlabel: { align: "left", bgcolor: css("--shade"), bordercolor: css("--soft"), font: { color: css("--ink"), size: 11 } },
      legend: narrow() ? { orientation: "h", y: -0.3, font: { size: 10 } } : { font: { size: 11 } },
      height: narrow() ? 460 : 520,
      ...more,
    };
    merged.xaxis = { ...axis, ...more.xaxis };
    merged.yaxis = { ...axis, ...more.yaxis };
    return merged;
  }

  async function draw(name, traces, options) {
    const place = $(name + "-chart");
    const library = await plotly();
    if (place.querySelector(".wait")) place.replaceChildren();
    await library.react(place, traces, layout(options), { displaylogo: false, displayModeBar: false, responsive: true });
    place.dataset.drawn = String(Number(place.dataset.drawn ?? 0) + 1);
    return place;
  }
  async function nothing(name, text) {
    const place = $(name + "-chart");
    if (place.dataset.drawn && window.Plotly) window.Plotly.purge(place); // its listeners too
    delete place.dataset.listens;
    place.replaceChildren(element("p", { class: "wait" }, text));
    place.dataset.drawn = String(Number(place.dataset.drawn ?? 0) + 1);
    caption(name, "");
    $(name + "-data").replaceChildren();
    $(name + "-data").closest("details").hidden = true;
  }
  function caption(name, text) {
    $(name + "-caption").textContent = text;
  }
  function data(name, made) {
    $(name + "-data").closest("details").hidden = false;
    $(name + "-data").replaceChildren(made);
  }
  const again = (name) => seen.has(name) && charts[name]().catch(trouble);

  function look(core, method, variant) {
    const known = core.looks.methods[method] ?? { colour: null, symbol: "circle" };
    const filled = method === core.looks.reference ? "" : (core.looks.fills[variant] ?? "");
    const colour = (dark() && ON_DARK[known.colour]) || known.colour || css("--ink");
    return { colour, symbol: known.symbol + filled };
  }

  // Quality against cost.

  function front(points, x, y) {
    const better = (p, q) => x.merit(p) >= x.merit(q) && y.merit(p) >= y.merit(q) && (x.merit(p) > x.merit(q) || y.merit(p) > y.merit(q));
    return points.filter((p) => !points.some((q) => better(q, p)));
  }

  function pareto(core, all) {
    const form = $("pareto-controls"), f = form.elements;
    const axes = [...Object.entries(QUALITY), ...Object.entries(COSTS).map(([k, [title]]) => [k, title])].filter(([k]) => all.some((p) => p[k] !== null));
    fill(f.x, axes, axes.some(([k]) => k === "adapter_parameters") ? "adapter_parameters" : axes.at(-1)[0]);
    fill(f.y, axes, "test");
    const tasks = unique(all.map((p) => p.task)).sort();
    fill(f.task, tasks.map((t) => [t, t || "mean of all tasks"]), tasks[0]);
    fill(f.model, everything(unique(all.map((p) => p.model)), "models"), "");
    const ranks = unique(all.map((p) => p.rank).filter((r) => r !== null)).sort((a, b) => a - b);
    fill(f.rank, ranks.length > 1 ? everything(ranks, "ranks") : [], "");
    f.all.closest("label").style.display = all.some((p) => !p.chosen) ? "" : "none";
    const methods = unique(all.map((p) => p.method)).sort();
    $("pareto-methods").replaceChildren(...methods.map((m) => element("label", {}, element("input", { type: "checkbox", name: "method", value: m, checked: "" }), m)));
    const boxes = [...form.querySelectorAll("input[name=method]")];
    const count = () => ($("pareto-count").textContent = `(${boxes.filter((b) => b.checked).length} of ${boxes.length} shown)`);
    form.querySelectorAll("[data-tick]").forEach((button) => button.addEventListener("click", () => {
      boxes.forEach((box) => (box.checked = button.dataset.tick === "all"));
      count();
      again("pareto");
    }));
    form.addEventListener("change", () => { count(); again("pareto"); });
    form.addEventListener("submit", (event) => event.preventDefault());
    count();

    const axis = (key, shown) => {
      const cost = COSTS[key];
      const sign = cost ? -1 : shown[0]?.greater === false ? -1 : 1;
      const merit = (p) => sign * p[key];
      if (!cost) {
        const metrics = unique(shown.map((p) => p.metric));
        return { key, merit, title: `${key} ${metrics.length === 1 ? metrics[0] : "score"}`, place: (v) => v, axis: {}, text: (p) => score(p[key], p[key + "_std"]) };
      }
      const ticks = scale(shown.map((p) => p[key]), cost[1]);
      const kinds = unique(shown.map((p) => p.memory_kind));
      const named = key === "memory_bytes" && kinds.length === 1 ? (KINDS[kinds[0]] ?? cost[0]) : cost[0];
      return { key, merit, title: named + (ticks.suffix ? ` (${ticks.suffix})` : ""), place: ticks.place, axis: ticks.axis, text: (p) => human(p[key], cost[1]) };
    };
    const hover = (p, x, y) => [
      `<b>${escaped(p.label)}</b>`,
      escaped([p.task || "mean of all tasks", p.model, p.device].join(" · ")),
      ...[x, y].map((a) => `${escaped(a.title.replace(/ \([^)]*\)$/, ""))}: ${escaped(a.text(p))}`),
      ...(p.low !== null ? [`95 % interval [${score(p.low)}, ${score(p.high)}]`] : []),
      `${p.seeds} seeds` + (p.lost ? `, ${p.lost} lost` : "") + (p.lr !== null ? `, learning rate ${p.lr}` : "") + (p.rank !== null ? `, rank ${p.rank}` : ""),
      ...commandLines(p.command),
    ].join("<br>");

    charts.pareto = async () => {
      const wanted = new Set(boxes.filter((b) => b.checked).map((b) => b.value));
      const [kx, ky] = [f.x.value, f.y.value];
      const matching = all.filter((p) =>
        wanted.has(p.method) && p.task === f.task.value && (!f.model.value || p.model === f.model.value) &&
        (!f.rank.value || String(p.rank) === f.rank.value) && (p.chosen || f.all.checked));
      const shown = matching.filter((p) => p[kx] !== null && p[ky] !== null);
      const left = matching.length - shown.length;
      if (!shown.length) return nothing("pareto", matching.length ? "None of these configurations has both measures." : "No configuration is left by these filters.");
      const x = axis(kx, shown), y = axis(ky, shown);
      const best = front(shown, x, y).sort((a, b) => a[kx] - b[kx]);
      const spread = (a) => (QUALITY[a.key] ? { type: "data", thickness: 1, width: 3, color: css("--soft") } : undefined);
      const traces = unique(shown.map((p) => p.method)).map((method) => {
        const mine = shown.filter((p) => p.method === method);
        const looks = mine.map((p) => look(core, method, p.variant));
        return {
          type: "scatter", name: method, mode: f.names.checked ? "markers+text" : "markers",
          x: mine.map((p) => x.place(p[kx])), y: mine.map((p) => y.place(p[ky])),
          error_x: spread(x) && { ...spread(x), array: mine.map((p) => p[kx + "_std"] ?? 0) },
          error_y: spread(y) && { ...spread(y), array: mine.map((p) => p[ky + "_std"] ?? 0) },
          text: mine.map((p) => p.variant), textposition: "top center", textfont: { size: 10 },
          hovertext: mine.map((p) => hover(p, x, y)), hoverinfo: "text", customdata: mine.map((p) => all.indexOf(p)),
          marker: { color: looks.map((l) => l.colour), symbol: looks.map((l) => l.symbol), size: method === core.looks.reference ? 14 : 9, line: { width: 1.5, color: looks.map((l) => l.colour) } },
        };
      });
      traces.unshift({ type: "scatter", mode: "lines", name: "front", x: best.map((p) => x.place(p[kx])), y: best.map((p) => y.place(p[ky])), line: { color: css("--soft"), width: 1.5, shape: COSTS[kx] && !COSTS[ky] ? "hv" : "linear" }, hoverinfo: "skip" });
      const place = await draw("pareto", traces, { showlegend: !narrow() || traces.length <= 10, xaxis: { title: { text: x.title }, ...x.axis }, yaxis: { title: { text: y.title }, ...y.axis } });
      if (!place.dataset.listens) {
        place.dataset.listens = "yes";
        place.on("plotly_click", (event) => event.points[0].customdata !== undefined && choose(all[event.points[0].customdata]));
      }
      const bars = QUALITY[kx] || QUALITY[ky] ? " Bars: standard deviation over seeds." : "";
      caption("pareto", `${shown.length} configurations, ${best.length} of them on the front: ${best.map((p) => p.variant).join(", ")}.` + (left ? ` ${left} lack one of the two measures.` : "") + bars);
      const pick = (p) => element("button", { type: "button", onclick: () => choose(p, true) }, "show");
      data("pareto", table("Configurations shown", ["configuration", "model", "command", x.title.replace(/ \([^)]*\)$/, ""), y.title.replace(/ \([^)]*\)$/, ""), "seeds", "front"],
        shown.map((p) => [p.label, p.model, pick(p), x.text(p), y.text(p), String(p.seeds), best.includes(p) ? "yes" : "no"]), 3));
    };

    function choose(p, focus) {
      const card = $("chosen");
      const first = element("h3", { tabindex: "-1" }, p.label);
      const costs = Object.entries(COSTS).filter(([k]) => p[k] !== null).map(([k, [title, unit]]) => [title, human(p[k], unit)]);
      card.replaceChildren(
        first,
        pairs([["task", p.task || "mean of all tasks"], ["model", p.model], ["device", p.device], [`test ${p.metric}`, score(p.test, p.test_std)], ["validation", score(p.validation, p.validation_std)], ["seeds", `${p.seeds} of ${p.runs}`], ...costs]),
        element("p", {}, "Make it again:"),
        copyable(p.command),
        element("p", {}, element("a", { href: "#runs", onclick: () => only(p) }, "Its runs")),
      );
      card.hidden = false;
      if (focus) first.focus();
    }
  }

  const pairs = (entries) => element("dl", { class: "pairs" }, ...entries.flatMap(([key, value]) => [element("dt", {}, key), element("dd", {}, value ?? MISSING)]));

  // Methods by task.

  function heat(core, all) {
    const f = $("heat-controls").elements;
    const hosts = unique(all.map((p) => p.model));
    fill(f.model, hosts.map((m) => [m, m]), hosts[0]);
    $("heat-controls").addEventListener("change", () => again("heat"));
    charts.heat = async () => {
      const mine = all.filter((p) => p.task && p.chosen && p.model === f.model.value && p.test !== null);
      const tasks = unique(mine.map((p) => p.task)).sort(), variants = unique(mine.map((p) => p.variant));
      if (!mine.length) return nothing("heat", "No run has a score.");
      const at = new Map(mine.map((p) => [p.variant + "\n" + p.task, p]));
      const range = Object.fromEntries(tasks.map((t) => {
        const values = mine.filter((p) => p.task === t).map((p) => p.test);
        return [t, [Math.min(...values), Math.max(...values)]];
      }));
      const shade = (p) => {
        const [low, high] = range[p.task];
        return high === low ? 1 : p.greater ? (p.test - low) / (high - low) : (high - p.test) / (high - low);
      };
      const cell = (v, t) => at.get(v + "\n" + t) ?? null;
      const mean = (v) => {
        const known = tasks.map((t) => cell(v, t)).filter(Boolean).map(shade);
        return known.reduce((a, b) => a + b, 0) / known.length;
      };
      variants.sort((a, b) => mean(a) - mean(b)); // the best on top, as the axis points up
      const z = variants.map((v) => tasks.map((t) => (cell(v, t) ? shade(cell(v, t)) : null)));
      const text = variants.map((v) => tasks.map((t) => score(cell(v, t)?.test)));
      const over = variants.map((v) => tasks.map((t) => {
        const p = cell(v, t);
        return p ? `<b>${escaped(p.label)}</b><br>${escaped(t)}, ${escaped(p.metric)}: ${score(p.test, p.test_std)}<br>${p.seeds} seeds<br><br>${wrapped(p.command, narrow() ? 38 : 72)}` : "";
      }));
      await draw("heat", [{
        type: "heatmap", x: tasks, y: variants, z, text, texttemplate: "%{text}", textfont: { size: narrow() ? 9 : 11, color: "#222222" }, hovertext: over, hoverinfo: "text",
        colorscale: [[0, "#F5F5F5"], [1, "#56B4E9"]], zmin: 0, zmax: 1, xgap: 1, ygap: 1, // dark text is legible on all of it
        colorbar: narrow() ? undefined : { title: { text: "of the task's range", side: "right" }, tickvals: [0, 1], ticktext: ["worst", "best"], thickness: 12, lenmode: "pixels", len: 200, y: 1, yanchor: "top" }, showscale: !narrow(),
      }], { height: 120 + 20 * variants.length, margin: { l: 8, r: 12, t: 36, b: 12 }, xaxis: { type: "category", side: "top", fixedrange: true, showgrid: false }, yaxis: { type: "category", fixedrange: true, showgrid: false, dtick: 1, tickfont: { size: narrow() ? 9 : 11 } } });
      caption("heat", "Mean test score over seeds, shaded from a task's worst to its best configuration; ordered by the mean shade. Each task has a metric and a range of its own: compare shades down a column, not along a row.");
      data("heat", table("Mean test score ± standard deviation over seeds", ["method", ...tasks], [...variants].reverse().map((v) => [v, ...tasks.map((t) => score(cell(v, t)?.test, cell(v, t)?.test_std))])));
    };
  }

  // Learning rates and ranks.

  function curves(core, all) {
    const f = $("curves-controls").elements;
    const scored = all.filter((p) => p.task);
    const tasks = unique(scored.map((p) => p.task)).sort();
    fill(f.task, tasks.map((t) => [t, t]), tasks[0]);
    const models = unique(scored.map((p) => p.model));
    fill(f.model, models.map((m) => [m, m]), models[0]);
    $("curves-controls").addEventListener("change", () => { again("rates"); again("ranks"); });
    const here = () => scored.filter((p) => p.task === f.task.value && p.model === f.model.value);
    const dashes = ["solid", "dash", "dot", "dashdot"];

    async function lines(name, points, key, by, split, base, title, without) {
      const groups = new Map();
      for (const p of points) if (p[key] !== null) groups.set(p[by], [...(groups.get(p[by]) ?? []), p]);
      const drawn = [...groups].filter(([, mine]) => unique(mine.filter((p) => p[split] !== null).map((p) => p[key])).length > 1);
      if (!drawn.length) return nothing(name, without);
      const per = {};
      const traces = [], rows = [];
      const values = drawn.flatMap(([, mine]) => mine).map((p) => p[split]).filter((v) => v !== null);
      const floor = Math.min(...values) - 0.08 * (Math.max(...values) - Math.min(...values) || 1);
      for (const [label, mine] of drawn.sort(([a], [b]) => a.localeCompare(b))) {
        mine.sort((a, b) => a[key] - b[key]);
        const method = mine[0].method;
        const nth = (per[method] = (per[method] ?? -1) + 1);
        const { colour, symbol } = look(core, method, mine[0].variant);
        const known = mine.filter((p) => p[split] !== null);
        const best = name === "rates" && known.find((p) => p.chosen);
        const over = (p) => `<b>${escaped(p.label)}</b><br>${title} ${p[key]}: ${score(p[split], p[split + "_std"])}<br>${p.seeds} of ${p.runs} seeds${best === p ? "<br>selected" : ""}<br><br>${wrapped(p.command, narrow() ? 38 : 72)}`;
        traces.push({
          type: "scatter", mode: "lines+markers", name: label, x: known.map((p) => p[key]), y: known.map((p) => p[split]),
          error_y: { type: "data", array: known.map((p) => p[split + "_std"] ?? 0), thickness: 1, width: 3 },
          line: { color: colour, width: 1.5, dash: dashes[nth % 4] }, marker: { color: colour, symbol, size: known.map((p) => (p === best ? 12 : 7)), line: { width: known.map((p) => (p === best ? 2.5 : 1)), color: known.map((p) => (p === best ? css("--ink") : colour)) } },
          hovertext: known.map(over), hoverinfo: "text",
        });
        const lost = mine.filter((p) => p.lost);
        if (name === "rates" && lost.length)
          traces.push({ type: "scatter", mode: "markers", name: label + ", lost runs", showlegend: false, x: lost.map((p) => p[key]), y: lost.map(() => floor), marker: { symbol: "x", size: 9, color: colour }, hovertext: lost.map((p) => `<b>${escaped(p.label)}</b><br>${p.lost} of ${p.runs} runs did not complete`), hoverinfo: "text" });
        rows.push(...mine.map((p) => [label, String(p[key]), score(p[split], p[split + "_std"]), `${p.seeds} of ${p.runs}`, p.chosen ? "yes" : "no"]));
      }
      const ticks = unique(drawn.flatMap(([, mine]) => mine.map((p) => p[key]))).sort((a, b) => a - b);
      const decades = Array.from({ length: 16 }, (_, i) => 10 ** (i - 10)).filter((t) => t >= ticks[0] && t <= ticks.at(-1));
      const marks = base === 10 && ticks.length > 7 && decades.length > 1 ? decades : ticks.filter((_, i) => i % Math.ceil(ticks.length / (narrow() ? 5 : 9)) === 0);
      await draw(name, traces, {
        showlegend: !narrow() || drawn.length <= 10,
        xaxis: { type: "log", title: { text: title }, tickvals: marks, ticktext: marks.map((t) => (base === 10 ? Number(t.toPrecision(3)).toExponential().replace("e+0", "").replace("e+", "e") : String(t))) },
        yaxis: { title: { text: `${split} ${drawn[0][1][0].metric}` } },
      });
      caption(name, `Bars: standard deviation over seeds.` + (name === "rates" ? " The larger, ringed point is the selected one. Crosses at the bottom: runs were lost there." : ""));
      data(name, table(`${split} score by ${title}`, [by, title, `${split} score`, "seeds", "selected"], rows));
    }
    charts.rates = () => lines("rates", here(), "lr", "variant", "validation", 10, "learning rate", "No method was run at two learning rates or more.");
    charts.ranks = () => lines("ranks", here().filter((p) => p.chosen), "rank", "line", "test", 2, "rank", "No method was run at two ranks or more.");
  }

  // Memory.

  function memory(core, rows) {
    const parts = Object.entries(core.looks.parts);
    const host = (r) => [r.model, r.device_kind, KINDS[r.memory_kind] ?? r.memory_kind, `${r.shape} tokens`].join(", ");
    const hosts = unique(rows.map(host));
    fill($("memory-controls").elements.host, hosts.map((h) => [h, h]), hosts[0]);
    $("memory-controls").addEventListener("change", () => again("memory"));
    charts.memory = async () => {
      if (!rows.length) return nothing("memory", "No run has its memory by component.");
      const mine = rows.filter((r) => host(r) === ($("memory-controls").elements.host.value || hosts[0])).sort((a, b) => b.peak - a.peak);
      // Tasks of one shape that cost differently (another number of labels) have bars of their own.
      const names = mine.map((r) => (mine.filter((o) => o.variant === r.variant).length > 1 ? `${r.variant} (${r.tasks})` : r.variant));
      const [factor, suffix] = UNITS.bytes.find(([s]) => Math.max(...mine.map((r) => r.peak)) >= s);
      const traces = parts.map(([part, colour]) => ({
        type: "bar", orientation: "h", name: part, y: names, x: mine.map((r) => r[part] / factor), marker: { color: colour },
        hovertext: mine.map((r) => `<b>${escaped(r.variant)}</b><br>${part}: ${human(r[part], "bytes")}<br>peak: ${human(r.peak, "bytes")}<br>tasks: ${escaped(r.tasks)}`), hoverinfo: "text",
      }));
      traces.push({ type: "scatter", mode: "markers", name: "peak", y: names, x: mine.map((r) => r.peak / factor), marker: { symbol: "line-ns", size: 13, line: { width: 2, color: css("--ink") } }, hoverinfo: "skip" });
      await draw("memory", traces, { barmode: "stack", height: 150 + 20 * mine.length, legend: { orientation: "h", y: 1.02, yanchor: "bottom", traceorder: "normal" }, margin: { l: 8, r: 12, t: 40, b: 48 }, xaxis: { title: { text: `memory at the peak (${suffix.trim()})` } }, yaxis: { type: "category", dtick: 1, tickfont: { size: narrow() ? 9 : 11 } } });
      caption("memory", "Marks: the peak as plain steps have it; the components come from one recorded step and miss it by the residual.");
      data("memory", table(host(mine[0]), ["method", "peak", ...parts.map(([p]) => p), "residual"], [...mine].reverse().map((r) => [names[mine.indexOf(r)], human(r.peak, "bytes"), ...parts.map(([p]) => human(r[p], "bytes")), human(r.residual, "bytes")])));
    };
  }

  // -- runs -----------------------------------------------------------------------------------------------------------

  const PAGE = 50;
  let index = null; // all runs
  let page = 0;
  const runs = async () => (index ??= blob("runs").then(({ runs, parts }) => ({ rows: rowsOf(runs), parts })));
  const status = (run) => element("span", { class: run.status === "completed" ? null : "status-bad" }, run.status.replaceAll("_", " "));
  const link = (run) => element("a", { href: "#run=" + encodeURIComponent(run.id) }, run.id);

  async function list() {
    const { rows } = await runs();
    const f = $("runs-controls").elements;
    const words = f.words.value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = rows.filter((r) =>
      (!f.status.value || r.status === f.status.value) && (!f.task.value || r.task === f.task.value) && (!f.method.value || r.method === f.method.value) && (!f.model.value || r.model === f.model.value) &&
      words.every((w) => `${r.id} ${r.label} ${r.task} ${r.model} ${r.status} ${r.error ?? ""}`.toLowerCase().includes(w)));
    const last = Math.max(0, Math.ceil(found.length / PAGE) - 1);
    page = Math.min(page, last);
    const shown = found.slice(page * PAGE, (page + 1) * PAGE);
    $("runs-count").textContent = `${found.length} of ${rows.length} runs`;
    $("runs-page").textContent = `page ${page + 1} of ${last + 1}`;
    $("runs-before").disabled = page === 0;
    $("runs-after").disabled = page === last;
    const made = table("Runs", ["run", "status", "task", "model", "configuration", "metric", "seed", "validation", "test"],
      shown.map((r) => [link(r), status(r), r.task, r.model, r.label, r.metric, String(r.seed), score(r.validation), score(r.test)]), 6);
    made.classList.remove("tall");
    $("runs-list").replaceChildren(made);
  }
  let listing = null; // the list's start, once
  const listed = () => (listing ??= startList());
  async function startList() {
    const { rows } = await runs();
    const f = $("runs-controls").elements;
    for (const [name, what] of [["status", "statuses"], ["task", "tasks"], ["method", "methods"], ["model", "models"]])
      fill(f[name], everything(unique(rows.map((r) => r[name])).sort(), what), "");
    const changed = () => { page = 0; list(); };
    $("runs-controls").addEventListener("input", changed);
    $("runs-controls").addEventListener("submit", (event) => event.preventDefault());
    $("runs-before").addEventListener("click", () => { page -= 1; list(); });
    $("runs-after").addEventListener("click", () => { page += 1; list(); });
    await list();
  }
  async function only(point) {
    await listed();
    const f = $("runs-controls").elements;
    f.words.value = "";
    f.status.value = "";
    f.task.value = point.task;
    f.model.value = f.model.options.length > 1 ? point.model : f.model.value;
    f.method.value = point.method;
    page = 0;
    await list();
  }

  function flat(value, prefix = "") {
    if (value === null || typeof value !== "object" || Array.isArray(value)) return [[prefix, value === null ? "null" : Array.isArray(value) ? JSON.stringify(value) : String(value)]];
    return Object.entries(value).flatMap(([key, inner]) => flat(inner, prefix ? `${prefix}.${key}` : key));
  }
  const settings = (title, value) => {
    const entries = flat(value).filter(([key]) => key);
    return element("div", {}, element("h3", {}, title), entries.length ? pairs(entries) : element("p", {}, "none"));
  };

  async function show(id) {
    const { rows, parts } = await runs();
    const at = rows.findIndex((r) => r.id === id);
    document.body.dataset.view = "run";
    $("overview").hidden = true;
    $("run-view").hidden = false;
    $("h-run").textContent = at < 0 ? "No such run" : id;
    const body = $("run-body");
    if (at < 0) {
      body.replaceChildren(element("p", {}, `${id} is none of the runs of this folder.`));
      return $("h-run").focus();
    }
    const run = rows[at];
    const { chunk } = await blob("core");
    const trace = (await blob(`trace-${Math.floor(at / chunk)}`))[at % chunk];
    const spec = Object.fromEntries(Object.entries(run.spec).map(([key, place]) => [key, parts[place]]));
    body.replaceChildren(
      pairs([["status", status(run)], ["configuration", run.label], ["task", run.task], ["model", run.model], ["seed", String(run.seed)], ["created", run.created],
        ...Object.entries(run.scores).flatMap(([split, found]) => Object.entries(found).map(([m, v]) => [`${split} ${m.replaceAll("_", " ")}`, score(v)])),
        ["selected step", run.selected_step === null ? null : String(run.selected_step)]]),
      ...(run.error ? [element("h3", {}, "Reason"), element("pre", { tabindex: "0", "aria-label": "Reason" }, run.error)] : []),
      element("h3", {}, "Make it again"), copyable(run.command),
      ...(run.typed ? [element("p", {}, "It was made by:"), element("pre", { tabindex: "0", "aria-label": "The command that made it" }, run.typed)] : []),
      element("h3", {}, "Training"),
      element("div", { class: "chart", id: "trace-chart", role: "img", "aria-label": "Line chart of the training loss and the validation metric by step; its data are in the table below it" }, element("p", { class: "wait" }, "Drawing …")),
      element("p", { class: "caption", id: "trace-caption" }, ""),
      element("details", { class: "data" }, element("summary", {}, "Data of this chart as a table"), element("div", { id: "trace-data" })),
      settings("Configuration", { protocol: run.protocol, device: run.device, ...spec }),
      settings("Cost", run.cost === null ? {} : parts[run.cost]),
      ...Object.entries(run.more).map(([key, value]) => settings(key[0].toUpperCase() + key.slice(1), value)),
      settings("Environment", parts[run.environment]),
    );
    document.title = `${id} · peftbench`;
    $("run-view").scrollIntoView({ behavior: "instant" });
    $("h-run").focus({ preventScroll: true });
    charts.trace = () => lossChart(run, trace);
    seen.add("trace");
    await charts.trace();
  }

  async function lossChart(run, trace) {
    const steps = trace.loss.map((_, i) => Math.min(trace.steps, Math.round(i * trace.every + (trace.every + 1) / 2)));
    if (!trace.loss.some((v) => v !== null) && !trace.evaluations.length) return nothing("trace", "The record holds neither losses nor evaluations.");
    const traces = [];
    if (trace.loss.length) traces.push({ type: "scatter", mode: "lines", name: "training loss", x: steps, y: trace.loss, line: { color: "#0072B2", width: 1.5 }, connectgaps: false });
    if (trace.evaluations.length) traces.push({ type: "scatter", mode: "lines+markers", name: `validation ${run.metric}`, x: trace.evaluations.map(([s]) => s), y: trace.evaluations.map(([, v]) => v), yaxis: "y2", line: { color: "#D55E00", width: 1.5, dash: "dot" }, marker: { size: 9, symbol: "diamond" } });
    if (trace.rates.length) traces.push({ type: "scatter", mode: "lines", name: "learning rate", x: trace.rates.map(([s]) => s), y: trace.rates.map(([, v]) => v), yaxis: "y3", visible: "legendonly", line: { color: "#009E73", width: 1, dash: "dash" } });
    await draw("trace", traces, {
      height: 380, margin: { l: 8, r: 8, t: 12, b: 48 }, legend: { orientation: "h", y: 1.02, yanchor: "bottom" },
      xaxis: { title: { text: "optimizer step" }, rangemode: "tozero" }, yaxis: { title: { text: "training loss" } },
      yaxis2: { overlaying: "y", side: "right", title: { text: `validation ${run.metric}` }, showgrid: false, zeroline: false, automargin: true },
      yaxis3: { overlaying: "y", side: "right", visible: false, showgrid: false },
    });
    caption("trace", (trace.every > 1 ? `Each point of the loss is the mean of ${trace.every} steps. ` : "") + "The legend shows and hides curves; the learning rate is hidden at first.");
    const rows = steps.map((s, i) => [String(s), trace.loss[i] === null ? "not finite" : String(trace.loss[i]), MISSING]);
    for (const [s, v] of trace.evaluations) rows.push([String(s), MISSING, score(v)]);
    rows.sort((a, b) => Number(a[0]) - Number(b[0]));
    data("trace", table("Training loss and validation by step", ["step", "training loss", `validation ${run.metric}`], rows));
  }

  const title = document.title;
  function route() {
    const id = location.hash.match(/^#run=(.+)$/)?.[1];
    if (id) return show(decodeURIComponent(id)).catch(trouble);
    if (document.body.dataset.view !== "run") return;
    delete document.body.dataset.view;
    $("run-view").hidden = true;
    $("overview").hidden = false;
    seen.delete("trace");
    document.title = title;
    $(location.hash.slice(1) || "main")?.scrollIntoView();
  }

  // -- start ----------------------------------------------------------------------------------------------------------

  function trouble(error) {
    console.error(error);
    $("trouble").textContent = `A chart or a run could not be shown: ${error.message ?? error}. The tables hold the same numbers.`;
    $("trouble").hidden = false;
  }

  function boards() {
    const select = $("board-task");
    if (!select) return;
    select.closest(".controls").hidden = false;
    const chosen = () => document.querySelectorAll(".board").forEach((b) => (b.hidden = select.value !== "*" && b.dataset.board !== select.value));
    select.addEventListener("change", chosen);
    chosen();
  }

  let core = null;
  async function start() {
    document.querySelectorAll("table.sortable").forEach(sortable);
    boards();
    if (!("DecompressionStream" in window)) {
      document.body.classList.add("unscripted");
      throw new Error("this browser cannot unpack gzip (it lacks DecompressionStream)");
    }
    core = await blob("core");
    const all = rowsOf(core.points);
    pareto(core, all);
    heat(core, all);
    curves(core, all);
    memory(core, rowsOf(core.memory));
    const watch = new IntersectionObserver((entries) => entries.filter((e) => e.isIntersecting).forEach(({ target }) => {
      watch.unobserve(target);
      if (target.id === "runs-list") return listed().catch(trouble);
      seen.add(target.dataset.chart);
      charts[target.dataset.chart]().catch(trouble);
    }), { rootMargin: "400px" });
    document.querySelectorAll("[data-chart]").forEach((place) => watch.observe(place));
    watch.observe($("runs-list"));
    window.addEventListener("hashchange", route);
    document.querySelector(".skip").addEventListener("click", (event) => {
      if (document.body.dataset.view !== "run") return;
      event.preventDefault(); // the content is the run, not the overview
      $("h-run").focus();
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => seen.forEach(again));
    let small = narrow();
    window.addEventListener("resize", () => small !== narrow() && ((small = narrow()), seen.forEach(again)));
    route();
    document.body.dataset.ready = "yes";
  }
  start().catch(trouble);
})();
