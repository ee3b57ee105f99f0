"""Iterative training as a resumable state machine: sample, judge, pair, cache log-probs, train, and again.

    RUN/manifest.json, recipe.yaml         the recipe; every complete stage with the SHA-256 of its files
    RUN/prompts/prompts.jsonl              every prompt with the iteration that it belongs to
    RUN/iteration-1/samples/               K responses to each prompt of the iteration (`alignment.models.pools`)
    RUN/iteration-1/calibration/           where the objective needs it: a response of the reference to each prompt
    RUN/iteration-1/judged/                scores or comparisons, one shard for each of samples
    RUN/iteration-1/pairs/pairs.jsonl      preferences with token ids; counts.json says what was dropped
    RUN/iteration-1/logps/logps.jsonl      log-probs of the pairs under the reference and the previous iterate
    RUN/iteration-1/recipe.yaml, train/    an ordinary recipe and its run directory
    RUN/final                              the last iterate

`driver.run` goes through them; `stage` is what its processes do. A stage works in NAME.unfinished, which becomes NAME
when it is complete.
"""
