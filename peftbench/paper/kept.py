"""What the package itself keeps: declarations of methods, the parity gate's results, verdicts on published figures."""

from collections import Counter
from collections.abc import Sequence

from peftbench import published, registry, verify
from peftbench.paper.names import METHODS
from peftbench.paper.sources import Source
from peftbench.paper.values import RAGGED, Sheet, Values, cells, key, tex
from peftbench.reproduce import measured, pages
from peftbench.reproduce.records import configurations

NOT_RUN = "not run here"
CITED = {
    "adalora": "zhang2023adalora", "bitfit": "benzaken2022bitfit", "boft": "liu2024boft",
    "compacter": "mahabadi2021compacter", "dora": "liu2024dora", "fourierft": "gao2024fourierft",
    "galore": "zhao2024galore", "houlsby": "houlsby2019adapters", "hra": "yuan2024hra", "hra_gs": "yuan2024hra",
    "ia3": "liu2022tfew", "layernorm": "zhao2023layernorm", "loha": "hyeonwoo2022fedpara", "lokr": "yeh2024lycoris",
    "lora": "hu2021lora", "lora_fa": "zhang2023lorafa", "lora_plus": "hayou2024loraplus", "miss": "kang2025miss",
    "mpt": "wang2023mpt", "oft": "qiu2023oft", "oftv2": "qiu2025oftv2", "parallel": "he2022unified",
    "pfeiffer": "pfeiffer2020madx", "pissa": "meng2024pissa", "prefix": "li2021prefix", "prompt": "lester2021prompt",
    "ptuning": "liu2021ptuning", "ptuning_v2": "liu2022ptuningv2", "qlora": "dettmers2023qlora",
    "randlora": "albert2025randlora", "relora": "lialin2023relora", "road": "liao2024road",
    "rslora": "kalajdzievski2023rslora", "ssf": "lian2022ssf", "vera": "kopiczko2024vera",
}  # fmt: skip
"""Method → the bibliography's entry."""


def put_methods(values: Values) -> dict[str, Sheet]:
    """Keep how many methods there are and what the parity gate found; returns the table of methods."""
    described = [registry.describe_method(name) for name in registry.options("method")]
    gate = verify.results()["methods"]
    values.count("methods/count", len(described))
    values.count("methods/packable", sum(bool(d["traits"]["packable"]) for d in described))
    values.count("methods/mergeable", sum(bool(d["traits"]["mergeable"]) for d in described))
    checks = [check for kept in gate.values() for check in kept["checks"]]
    values.count("parity/methods", len(gate))
    values.count("parity/checks", len(checks))
    values.count("parity/passed", sum(bool(c["passed"]) for c in checks))
    values.count("parity/failed", sum(not c["passed"] for c in checks))
    values.count("parity/steps", verify.STEPS)
    for what, most in verify.TOLERANCES.items():
        found = [c[what] for c in checks if c[what] is not None]
        values.power(f"parity/{what}", max(found, default=None))
        values.power(f"parity/{what}-tolerance", most)
    references = Counter(c["reference"].partition(" ")[0] for c in checks)
    for name in sorted(references):
        values.count(f"parity/against/{key(name)}", references[name])
    rows = []
    for one in described:
        against = [c["reference"].partition(" ")[0] for c in gate.get(one["name"], {"checks": []})["checks"]]
        cite = rf"~\citep{{{CITED[one['name']]}}}" if one["name"] in CITED else ""
        name = tex(METHODS.get(one["name"], one["name"])) + cite
        idea = tex(str(one["idea"]).rstrip("."))
        packs = "yes" if one["traits"]["packable"] else "no"
        rows.append([name, idea, *cells([packs, ", ".join(dict.fromkeys(against)) or None])])
    spec = rf"p{{0.25\textwidth}}{RAGGED}p{{0.46\textwidth}}l{RAGGED}p{{0.15\textwidth}}"
    return {"methods": Sheet(spec, ["method", "what trains", "packs", "held against"], rows)}


def put_verdicts(sources: Sequence[Source], values: Values) -> dict[str, Sheet]:
    """Keep the verdicts on published figures and claims by the sources' records; returns the tables of those judged."""
    here = [one for one in sources if one.there is not None]
    found = configurations([one.there for one in here if one.kind == "runs" and one.there is not None])
    measurements = measured.load([one.there for one in here if one.kind == "claims" and one.there is not None])
    rows_ = published.chosen([])
    # Rows of methods and tasks that nothing here was run with need no look at every record.
    ran = {(c.spec["method"]["name"], c.spec["task"].get("data") or c.spec["task"]["name"]) for c in found}
    judged = pages.judged([row for row in rows_ if (row.here.method, row.here.task) in ran], found)
    judged = [one for one in judged if one.verdict.verdict != NOT_RUN]
    counts = Counter(one.verdict.verdict for one in judged)
    values.count("published/rows", len(rows_))
    values.count("published/papers", len({row.paper.key for row in rows_}))
    values.count("published/run", len(judged))
    values.count("published/not-run", len(rows_) - len(judged))
    for verdict in pages.VERDICTS:
        if verdict != NOT_RUN:
            values.count(f"published/verdict/{key(verdict)}", counts[verdict])
    claims, plain = pages.claims_table(found, measurements)
    tried = [c for c in plain if c["verdict"] != NOT_RUN]
    verdicts = Counter(c["verdict"] for c in tried)
    values.count("claims/count", len(plain))
    values.count("claims/run", len(tried))
    values.count("claims/not-run", len(plain) - len(tried))
    for verdict in pages.VERDICTS:
        if verdict.startswith("claim"):
            values.count(f"claims/{key(verdict.removeprefix('claim '))}", verdicts[verdict])
    rows: list[list[str]] = []
    before = ""
    for one in judged:
        reason = one.verdict.reason
        rows.append(_line(one, "as above" if reason == before else reason))
        before = reason
    spec = rf"llrrl{RAGGED}p{{0.36\textwidth}}"
    headers = ["published as", "task", "published", "here", "verdict", "why"]
    sheets = {"verdicts": Sheet(spec, headers, rows)} if rows else {}
    if tried:
        lines = [
            cells([row[1], row[2], row[3]])
            for row, c in zip(claims.rows, plain, strict=True)
            if c["verdict"] != NOT_RUN
        ]
        spec = rf"{RAGGED}p{{0.3\textwidth}}{RAGGED}p{{0.2\textwidth}}{RAGGED}p{{0.42\textwidth}}"
        sheets["claims"] = Sheet(spec, ["claim", "verdict", "why"], lines)
    return sheets


def _line(one: pages.Judged, reason: str) -> list[str]:
    row, ours = one.row, one.measured
    theirs = str(row.value) + (f" ± {row.std:g}" if row.std is not None else "")
    here = None if ours is None else pages.number(ours.value, str(row.value))
    if ours is not None and ours.low is not None and ours.high is not None:
        here = f"{here} [{pages.number(ours.low, str(row.value))}, {pages.number(ours.high, str(row.value))}]"
    what = f"{row.model}, {row.method}"
    return cells([what, row.task.replace("GLUE ", ""), theirs, here, one.verdict.verdict, reason])
