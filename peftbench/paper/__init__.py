"""The paper: every number, table and figure made anew from records; prose by hand in `paper/`, numbers as macros.

`build.build` is the whole of it. Each kind of record has a module that turns it into values (`values.Values`: key →
text), tables and figures. Prose names them: ``\\val{glue-minilm/sst2/lora/gap}``, ``\\recordtable{…}``,
``\\recordfigure{…}``. What no record holds is printed as "not measured".
"""
