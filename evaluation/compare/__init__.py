"""`alignment compare`: one base model, one set of pairs, one budget, one judge, several objectives.

    alignment compare recipes/compare/tiny.yaml

`recipe` is the file, `plan` the runs that it asks for, `equivalence` which of them are the same method, `runs` their
processes, `measure` what is sampled of each policy, `matrix` the statistics, `figures` and `page` the report, and
`command` the order of all this. What is fair and what each column means: docs/compare.md.
"""
