"""The win-rate program: files against files end to end, mistakes, and a run directory with tiny real models."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from alignment.errors import UserError
from alignment.models import load_tokenizer
from alignment.models.pools import sample_pool
from alignment.models.sampling import Generation
from alignment.rewards import get_reward
from evaluation.comparison import Side, compare, describe
from evaluation.files import Prompt, locate_prompts, refuse_training_prompts
from evaluation.plans import ModelSource, Plan, plan_of_run, run_plan
from evaluation.report import report_content
from evaluation.win_rate import app, choose_form, run_program, win_rate_of_files
from tests import tiny_lm

REPOSITORY = Path(__file__).parents[2]
AS_SCRIPT = (sys.executable, str(REPOSITORY / "evaluation" / "win_rate.py"))
AS_MODULE = (sys.executable, "-m", "evaluation.win_rate")


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def responses(prompt: str, *texts: str) -> list[dict]:
    return [{"prompt": prompt, "response": text} for text in texts]


def run(
    *arguments: object, program: tuple[str, ...] = AS_SCRIPT, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    command, env = [*program, *map(str, arguments)], {**os.environ, **(env or {})}
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=60, env=env)


@pytest.fixture
def files(tmp_path):
    """Lengths. one: 3, 1 against 2; two: 2 against 2, 4; three: 5 against 1. Rows of b in another order."""
    a = [*responses("one", "xxx", "x"), *responses("two", "xx"), *responses("three", "xxxxx")]
    b = [*responses("three", "x"), *responses("two", "xx", "xxxx"), *responses("one", "xx")]
    return write_rows(tmp_path / "a.jsonl", a), write_rows(tmp_path / "b.jsonl", b)


def test_files_end_to_end(files, tmp_path):
    """By hand: scores 1/2 (win, loss), 1/4 (tie, loss), 1 (win); rate 7/12; won 3/2, lost 1: 3/5 without ties."""
    out = tmp_path / "out"
    done = run("--a", files[0], "--b", files[1], "--reward", "length", "--json", "--output", out)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads((out / "win_rate.json").read_text())
    assert result["win_rate"] == pytest.approx(7 / 12)
    assert result["win_rate_ties_dropped"] == pytest.approx(3 / 5)
    assert result["prompt_outcomes"] == {"wins": 1, "ties": 1, "losses": 1}
    assert result["pair_outcomes"] == {"wins": 2, "ties": 1, "losses": 2}
    assert result["mean_score"]["model"] == pytest.approx((2 + 2 + 5) / 3)
    assert result["mean_score"]["baseline"] == pytest.approx((2 + 3 + 1) / 3)
    assert result["samples_per_prompt"] == {"model": [1, 2], "baseline": [1, 2]}
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["win_rate"], row["score_change"]) for row in rows] == [
        ("one", 0.5, 0.0),
        ("two", 0.25, -1.0),
        ("three", 1.0, 4.0),
    ]
    left = [
        "annotations.json",
        "leaderboard.csv",
        "samples.jsonl",
        *(f"win_rate.{end}" for end in ("html", "json", "md")),
    ]
    assert sorted(path.name for path in out.iterdir()) == left  # no temporary file
    low, high = (100 * limit for limit in result["wilson_interval"])  # three prompts: the bootstrap's is too narrow
    assert f": 58.3 % ({low:.1f} to {high:.1f} %) over" in (out / "win_rate.html").read_text()


def test_pools_of_samples_are_sides(tiny, tmp_path):
    """A pool against the file of its own texts: what is finished is known of the pool alone; a chat is its text."""
    said = [[{"role": "user", "content": opening}] for opening in ("my dog is", "the cat was", "our house seems")]
    generation = Generation(max_new_tokens=4)
    pool = sample_pool(
        {"name_or_path": str(tiny)}, load_tokenizer(tiny), said, tmp_path / "pool", 3, generation=generation, seed=1
    )
    asked, answers = pool.read(0)
    rows = [
        row for prompt, texts in zip(asked, answers, strict=True) for row in responses(prompt[0]["content"], *texts)
    ]
    file = write_rows(tmp_path / "b.jsonl", rows)
    done = run("--a", pool.folder, "--b", file, "--reward", "length", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["win_rate"] == 0.5 and result["samples_per_prompt"] == {"model": [3, 3], "baseline": [3, 3]}
    assert result["cut_at_token_limit"] == {"model": pytest.approx(pool.unfinished() / 9), "baseline": None}
    assert pool.unfinished() > 0
    both = win_rate_of_files(pool.folder, pool.folder, get_reward("length"), resamples=100)
    assert both.result["win_rate"] == 0.5 and both.rows[0]["prompt"] == "my dog is"
    pool.file(0).unlink()
    done = run("--a", pool.folder, "--b", file, "--reward", "length")
    assert done.returncode == 2 and "1 of 1 shards are missing" in done.stderr


def test_module_form_prints_a_readable_block(files):
    done = run("--a", files[0], "--b", files[1], "--reward", "regex", "--reward-key", "pattern=^x", program=AS_MODULE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Win rate  50.0 %  (95 % interval 12.5 to 87.5 %)")  # Wilson's, of three
    for part in (
        "prompts     3, 1 to 2 samples each",
        "every pair is a tie",
        "verdict     too few prompts to tell: 3, and a claim needs 20",
        "the interval above is Wilson's; the bootstrap's, 50.0 to 50.0 %, has no width, since all prompts came",
        "difference +0 (interval not known: all 3 prompts have the same)",
        "seed 1",
        "regular expression '^x'",
    ):
        assert part in done.stdout
    assert "training" not in done.stdout.lower()  # two files: nothing is known of training


def test_program_mistakes_end_with_one_line_and_code_2(files, tmp_path):
    a, b = files
    lonely = write_rows(tmp_path / "lonely.jsonl", [*responses("one", "x"), *responses("zebra", "x")])
    out = tmp_path / "out"
    for arguments, message in (
        (
            ("--a", a, "--b", lonely, "--reward", "length", "--output", out),
            f"{a}:3: prompt 'two' is not in {lonely}; 2",
        ),
        (("--a", a, "--b", b, "--reward", "lenght"), "unknown reward 'lenght'; did you mean 'length'?"),
        ((tmp_path / "nowhere",), f"{tmp_path / 'nowhere'}: no such run directory"),
    ):
        done = run(*arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"error: {message}")
        assert done.stderr.count("\n") == 1
    assert not out.exists()
    assert run("--nonsense").returncode == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (set(), "give exactly one of"),
        ({"RUN_DIR", "a"}, "give exactly one of"),
        ({"a", "reward"}, "--b missing: needed with --a"),
        ({"model", "baseline", "reward"}, "--prompts missing: needed with --baseline, --model"),
        ({"a", "b", "reward", "top_p"}, "--top-p does not apply with --a, --b"),
        ({"a", "b", "reward", "chat"}, "--chat does not apply with --a, --b"),
        ({"RUN_DIR", "dtype"}, "--dtype does not apply with RUN_DIR"),
    ],
)
def test_options_of_another_form_are_refused(given, message):
    with pytest.raises(UserError) as caught:
        choose_form(given)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no rows"),
        ('{"prompt": "p", "response": "r"}\nnot json\n', ":2: not valid JSON"),
        ("[1]\n", ":1: a JSON object is needed, not list"),
        ('{"prompt": "p", "answer": "r"}\n', ":1: no 'response' in this row (it has prompt, answer)"),
        ('{"prompt": "p", "response": null}\n', ":1: response must be text, not None"),
        ('{"prompt": 7, "response": "r"}\n', ":1: prompt must be text or a list of messages"),
    ],
)
def test_unusable_rows_are_named(tmp_path, files, text, message):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(text)
    with pytest.raises(UserError) as caught:
        win_rate_of_files(files[0], bad, get_reward("length"))
    assert str(caught.value).startswith(str(bad))
    assert message in str(caught.value)


def test_chat_prompts_join_with_text_prompts(tmp_path):
    a = write_rows(tmp_path / "a.jsonl", responses("hello", "longer"))
    b = write_rows(tmp_path / "b.jsonl", [{"prompt": [{"role": "user", "content": "hello"}], "response": "short"}])
    assert win_rate_of_files(a, b, get_reward("length")).result["win_rate"] == 1.0


class _Unsure:
    """A judge that scores digits and nothing else."""

    name = "unsure"

    def score(self, prompts, responses):
        return [float(r) if r.isdigit() else float("nan") for r in responses]

    def describe(self):
        return "digits"


def test_unscored_responses_are_counted_and_written_as_null():
    model, baseline = Side("m", [["3", "?"], ["?"]]), Side("b", [["1", "4"], ["2"]])
    got = compare(["p", "q"], model, baseline, _Unsure(), resamples=200, seed=0)
    assert (got.result["prompts"], got.result["prompts_excluded"], got.result["pairs_excluded"]) == (1, 1, 3)
    assert got.result["win_rate"] == 0.5  # 3 beats 1, loses to 4
    assert "3 sample pairs and 1 whole prompts left out" in describe(got.result)
    assert got.rows[1]["win_rate"] != got.rows[1]["win_rate"]  # NaN here, null in the file
    with pytest.raises(UserError, match="could not score a single pair"):
        compare(["q"], Side("m", [["?"]]), Side("b", [["2"]]), _Unsure(), resamples=200, seed=0)


def test_prompts_are_named_by_their_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# a comment\n\n first \nsecond\nthird\n")
    assert locate_prompts(path, 2) == [Prompt("first", f"{path}:3"), Prompt("second", f"{path}:4")]
    with pytest.raises(UserError, match="missing.txt"):
        locate_prompts(tmp_path / "missing.txt")


def test_chat_prompts_are_kept_for_the_model_and_read_as_text_by_judges(tmp_path):
    ask, reply, more = ({"role": role, "content": text} for role, text in TURNS)
    file = write_rows(tmp_path / "p.jsonl", [{"prompt": [ask]}, {"prompt": [ask, reply, more], "chosen": "x"}])
    one, two = locate_prompts(file)
    assert (one.text, two.text) == ("why", "user: why\nassistant: so\nuser: and then")
    assert one.given(chat=False) == [ask] and two.given(chat=True) == [ask, reply, more]
    assert locate_prompts(write_rows(tmp_path / "q.jsonl", [{"prompt": "why"}]))[0].given(chat=True) == [ask]
    alike = [{"prompt": [ask, reply, more]}, {"prompt": [{"role": "user", "content": two.text}]}]
    with pytest.raises(UserError, match=r"alike\.jsonl:2: reads like the prompt of .*alike\.jsonl:1"):
        locate_prompts(write_rows(tmp_path / "alike.jsonl", alike))


def test_prompts_that_were_trained_on_are_refused(tmp_path):
    chat = [{"role": "user", "content": "gamma"}]
    pairs = write_rows(tmp_path / "preferences.jsonl", [{"prompt": p} for p in ("alpha", "beta  two", "alpha", chat)])
    assert refuse_training_prompts([Prompt("delta", "f:1")], pairs) == 3
    prompts = [Prompt("delta", "f:1"), Prompt("beta two", "f:2"), Prompt("gamma", "f:3")]
    with pytest.raises(UserError) as caught:
        refuse_training_prompts(prompts, pairs)
    assert str(caught.value).startswith(
        f"f:2: prompt 'beta two' was trained on ({pairs}:2); 2 of 3 evaluation prompts"
    )


def test_rows_of_training_as_evaluation_prompts_are_refused(tmp_path):
    """A JSONL of the training rows, texts or chats: nothing that was trained on passes as a fresh prompt."""
    rows = [{"prompt": [{"role": "user", "content": "alpha"}], "chosen": [], "rejected": []}]
    pairs = write_rows(tmp_path / "preferences.jsonl", rows)
    for row in (rows[0], {"prompt": "alpha"}, {"messages": [{"role": "system", "content": "s"}, *rows[0]["prompt"]]}):
        prompts = locate_prompts(write_rows(tmp_path / "p.jsonl", [row]))
        with pytest.raises(UserError, match="was trained on"):
            refuse_training_prompts(prompts, pairs)


TURNS = (("user", "why"), ("assistant", "so"), ("user", "and then"))


def make_run(folder: Path, start: Path, prompts: list[str], **sections: object) -> Path:
    """A run directory as training leaves it, but for the model in `final`."""
    folder.mkdir()
    (folder / "heldout.txt").write_text("\n".join(prompts))
    recipe = {
        "model": {"name_or_path": str(start), "adapter": None, "dtype": "float32", "revision": None},
        "data": {"train": None, "sample": {"prompts": "openings.txt"}},
        "generation": {"max_new_tokens": 5, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "batch_size": 4, "seed": 0},
        "reward": {"name": "length"},
        "evaluation": {
            "prompts": str(folder / "heldout.txt"),
            "limit": None,
            "samples_per_prompt": 2,
            "bootstrap": 200,
        }
        | {"seed": 1},
        **sections,
    }
    (folder / "manifest.json").write_text(json.dumps({"recipe": recipe, "seed": 42, "chat": False}))
    write_rows(folder / "preferences.jsonl", [{"prompt": "trained on", "chosen": "a", "rejected": "b"}])
    return folder


def test_mistakes_in_a_run_are_found_before_a_model_is_loaded(tmp_path):
    run_dir = make_run(tmp_path / "run", tmp_path / "start", ["new", "trained  on"])
    with pytest.raises(UserError, match="final: no trained model there"):
        plan_of_run(run_dir)
    (run_dir / "final").mkdir()
    with pytest.raises(
        UserError, match=r"heldout.txt:2: prompt 'trained on' was trained on \(.*preferences.jsonl:1\)"
    ):
        plan_of_run(run_dir)
    with pytest.raises(UserError, match="evaluation seed 0 draws with generation.seed 0"):
        plan_of_run(run_dir, limit=1, seed=0)
    bare = make_run(tmp_path / "bare", tmp_path / "start", ["new"], reward=None, evaluation=None)
    (bare / "final").mkdir()
    with pytest.raises(UserError, match="no reward: section; name a judge with --reward"):
        plan_of_run(bare)
    with pytest.raises(UserError, match="no evaluation.prompts; give a file with --prompts"):
        plan_of_run(bare, judge=get_reward("length"))


def test_judge_is_the_training_reward_only_when_it_made_the_data(tmp_path):
    drawn = make_run(tmp_path / "drawn", tmp_path / "start", ["new"])
    given = make_run(tmp_path / "given", tmp_path / "start", ["new"], data={"train": "pairs.jsonl", "sample": None})
    for folder in (drawn, given):
        (folder / "final").mkdir()
    assert plan_of_run(drawn).notes["judge_is_training_reward"] is True
    assert plan_of_run(drawn, judge=get_reward("vader")).notes["judge_is_training_reward"] is False
    assert plan_of_run(given).notes["judge_is_training_reward"] is None  # who judged those pairs is not recorded
    (drawn / "preferences.jsonl").unlink()
    assert "not checked" in plan_of_run(drawn).notes["overlap_note"]


def save_tiny_model(folder: Path, seed: int) -> Path:
    """A random one-layer Llama over characters."""
    import torch
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = ["<end>", "<unknown>", *"abcdefghijklmnopqrstuvwxyz "]
    words = Tokenizer(models.WordLevel({c: i for i, c in enumerate(letters)}, unk_token="<unknown>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", unk_token="<unknown>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(letters), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=None, eos_token_id=0, pad_token_id=0, initializer_range=0.5, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def evaluate(run_dir: Path, **given: object) -> dict:
    """win_rate.json after `win_rate.py RUN_DIR` with the given options."""
    run_program({"RUN_DIR": run_dir, **given})
    return json.loads((run_dir / "win_rate.json").read_text())


def responses_of(run_dir: Path, side: str) -> list[list[str]]:
    rows = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    return [[sample["response"] for sample in row[side]] for row in rows]


def test_a_win_rate_over_conversations(tmp_path, capsys):
    """Both models get every turn through their template; the files have the conversation as text."""
    from transformers import AutoTokenizer

    run_dir = make_run(tmp_path / "run", save_tiny_model(tmp_path / "start", 0), ["unused"])
    save_tiny_model(run_dir / "final", 1)
    for folder in (tmp_path / "start", run_dir / "final"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}say "
        tokenizer.save_pretrained(folder)
    turns = [{"role": role, "content": text} for role, text in TURNS]
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": turns}, {"messages": turns[:2], "system": "be brief"}])
    result = evaluate(run_dir, prompts=prompts)
    assert result["sampling"]["chat"] is True and "prompts through the chat template" in capsys.readouterr().out
    rows = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    texts = ["user: why\nassistant: so\nuser: and then", "system: be brief\nuser: why"]
    assert [row["prompt"] for row in rows] == texts
    pools = [json.loads(line) for f in run_dir.rglob("shards/*.jsonl") for line in f.read_text().splitlines()]
    spelt = {"user why assistant so user and then say ", "system be brief user why say "}
    assert {"".join(tokenizer.convert_ids_to_tokens(row["prompt_ids"])) for row in pools} == spelt
    assert all(
        " ".join(text.split("\n")) in (run_dir / "report.html").read_text().replace("\n", " ") for text in texts
    )
    (tmp_path / "start" / "chat_template.jinja").write_text("{{ messages[-1].content }}")
    with pytest.raises(UserError, match=r"p\.jsonl:1: prompt: the chat template drops "):
        evaluate(run_dir, prompts=prompts)


def test_run_directory_end_to_end(tmp_path, capsys):
    prompts = ["a fine day", "the cat", "we", "once upon a time"]
    run_dir = make_run(tmp_path / "run", save_tiny_model(tmp_path / "start", 0), prompts)
    save_tiny_model(run_dir / "final", 1)
    result = evaluate(run_dir)
    assert result["judge_is_training_reward"] is True
    printed = capsys.readouterr().out
    assert "judge IS the reward that the model was trained on" in printed
    assert "prompts as plain text" in printed and "; never ended within 5 tokens: " in printed.splitlines()[0]
    assert result["sampling"]["chat"] is False
    rows = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == prompts
    # The win rate again, from the file, by loops and from the responses' own lengths.
    shares = []
    for row in rows:
        lengths = [[len(sample["response"]) for sample in row[side]] for side in ("model", "baseline")]
        assert [len(side) for side in lengths] == [2, 2]
        shares.append(sum((a > b) + (a == b) / 2 for a, b in itertools.product(*lengths)) / 4)
    assert result["win_rate"] == pytest.approx(sum(shares) / 4)
    assert (run_dir / "report.html").is_file()
    rate = f"Win rate {100 * result['win_rate']:.1f} % (95 % interval"
    assert all(f"- {rate}" in (place / "README.md").read_text() for place in (run_dir, run_dir / "final"))
    card = (run_dir / "README.md").read_text()
    assert "- verdict: too few prompts to tell: 4, and a claim needs 20\n" in card
    assert f"%) against {Path(result['baseline']).name}; never ended" in card
    before = (run_dir / "samples.jsonl").read_text()
    evaluate(run_dir)
    assert (run_dir / "samples.jsonl").read_text() == before  # same seed, same samples
    assert len(list((run_dir / "win_rate_samples").iterdir())) == 2  # the card has changed, the model has not
    assert not report_content(run_dir)["outdated"]


def test_a_model_against_itself_draws_anew_and_comes_out_near_one_half(tiny, tmp_path):
    """The two sides share no random numbers: equal samples at equal places would make the pairs dependent."""
    prompts = tiny_lm.openings()[:60]
    run_dir = make_run(tmp_path / "run", tiny, prompts)
    (run_dir / "final").symlink_to(tiny)
    result = evaluate(run_dir)
    assert result["sampling"]["seed"] != result["sampling"]["baseline_seed"]
    assert responses_of(run_dir, "model") != responses_of(run_dir, "baseline")
    assert result["interval"][0] < 0.5 < result["interval"][1]
    assert result["standard_error"] > 0


def test_outputs_against_themselves_are_exactly_one_half(files):
    result = win_rate_of_files(files[0], files[0], get_reward("length")).result
    assert (result["win_rate"], result["mean_score"]["difference"]) == (0.5, 0.0)


def test_greedy_is_one_response_for_all_samples(tiny, tmp_path, capsys):
    run_dir = make_run(tmp_path / "run", tiny, tiny_lm.openings()[:5])
    (run_dir / "final").symlink_to(tiny)
    assert evaluate(run_dir, temperature=0.0)["win_rate"] == 0.5
    assert responses_of(run_dir, "model") == responses_of(run_dir, "baseline")
    assert all(len(group) == 2 and len(set(group)) == 1 for group in responses_of(run_dir, "model"))
    assert "greedy: one response per prompt and model" in capsys.readouterr().out


def test_prompts_take_the_form_of_the_training_rows(tiny, tmp_path, capsys):
    """In a chat the tiny model answers with a sentence of its own, which repeats the opening; plain, it goes on."""
    openings = tiny_lm.openings()[:12]
    run_dir = make_run(tmp_path / "run", tiny, openings)
    (run_dir / "final").symlink_to(tiny)

    def repeated(side: str) -> float:
        """Share of responses that begin with their own prompt."""
        groups = zip(openings, responses_of(run_dir, side), strict=True)
        hits = [response.startswith(opening) for opening, group in groups for response in group]
        return sum(hits) / len(hits)

    def evaluated(**given: object) -> tuple[bool, str]:
        shared = {"max_new_tokens": 12, "batch_size": 24}
        return evaluate(run_dir, **shared, **given)["sampling"]["chat"], capsys.readouterr().out

    manifest = json.loads((run_dir / "manifest.json").read_text())
    (run_dir / "manifest.json").write_text(json.dumps(manifest | {"chat": True}))
    chat, printed = evaluated()
    assert chat and "prompts through the chat template" in printed
    assert repeated("model") > 0.4 and repeated("baseline") > 0.4  # by chance: one in 180
    assert "prompts through the chat template" in (run_dir / "report.html").read_text()
    chat, printed = evaluated(chat=False)
    assert not chat and "prompts as plain text" in printed
    assert repeated("model") == repeated("baseline") == 0


def test_chat_without_a_template_is_one_line_before_anything_is_sampled(tiny, tmp_path, monkeypatch):
    bare = save_tiny_model(tmp_path / "bare", 0)
    model, baseline = (ModelSource(str(p), {"name_or_path": str(p)}) for p in (tiny, bare))
    monkeypatch.setattr("evaluation.plans.sample_side", lambda *_: pytest.fail("sampled"))
    with pytest.raises(UserError) as caught:
        run_plan(Plan(model, baseline, [Prompt("hello", "f:1")], get_reward("length"), chat=True))
    assert str(caught.value).startswith(f"{bare}: its tokenizer has no chat template; use --no-chat")


@pytest.mark.parametrize(("words", "chat"), [([], None), (["--chat"], True), (["--no-chat"], False)])
def test_chat_option_reaches_the_plan(tmp_path, monkeypatch, words, chat):
    seen = {}
    monkeypatch.setattr("evaluation.win_rate.run_program", seen.update)
    assert CliRunner().invoke(app, [str(tmp_path), *words]).exit_code == 0
    assert seen == {"RUN_DIR": tmp_path} | ({} if chat is None else {"chat": chat})
