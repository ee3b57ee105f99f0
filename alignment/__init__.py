"""Preference alignment of language models: proved objectives, runnable recipes, honest comparison.

Importing this package imports nothing heavy; torch comes with `alignment.objectives`, transformers and TRL with
`alignment.models` and `alignment.trainers`.
"""

__version__ = "0.1.0"
