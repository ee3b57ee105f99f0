"""Cards as text: what `alignment objectives show NAME` prints, and what docs/ says of objectives.

Everything between the markers `<!-- NAME:begin -->` and `<!-- NAME:end -->` comes from the registry, and a test fails
where a file is stale; the prose around them is written by hand. Rewrite all of them, and begin the page of an
objective that has none yet, with

    python -m alignment.objectives.render
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from alignment.objectives import Card, HyperParameter, objective_class, own_cards
from alignment.objectives.samples import WHY_OF

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = {
    "pairs": "labelled pairs",
    "samples": "two of the policy's own per prompt (`SamplePairs`)",
    "groups": "a group of the policy's own per prompt (`GroupLogps`)",
}
JUDGES = {
    "none": "nothing judges them",
    "reward": "a scalar reward judges each",
    "oracle": "a pairwise oracle judges them against other samples",
    "verifier": "a verifier judges each answer",
}
SECTIONS = ("Formula", "When to use it", "What to watch", "What this implementation does", "Measured")
NEW_PAGE = "# {name}: {title}\n\nTODO: the idea.\n\n{sections}\n<!-- card:begin -->\n<!-- card:end -->\n"


def _hyperparameters(card: Card) -> tuple[str, tuple[HyperParameter, ...]]:
    """What selects the default variant ("" where there is only one) and its hyper-parameters."""
    default = objective_class(card.name).variant({}).card
    return default.selected, default.hyperparameters


def _needs(card: Card) -> str:
    needs = ", ".join(card.needs) or "policy only"
    return needs if card.batch == "pairs" else f"{needs} (on-policy)"


def _short(card: Card) -> str:
    """The formula up to its first semicolon: the main form."""
    return card.formula.split(";")[0]


def _default(value: object) -> str:
    return "unset" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _text(text: str) -> str:
    """Text of a card as Markdown: stars are stars; code in backticks stays as it is."""
    parts = text.split("`")
    return "`".join(part if i % 2 else part.replace("*", r"\*") for i, part in enumerate(parts))


def _cell(text: str) -> str:
    """The same, safe in a table's cell."""
    return _text(text).replace("|", r"\|")


def _code(text: str) -> str:
    """Code in a table's cell; the two Markdowns that read it, GitHub's and the site's, disagree on a bar in there."""
    return f"`{text.replace(' | ', ', ')}`"


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(header), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table_markdown(folder: str) -> str:
    """Name, paper, loss, needs; one row per objective. `folder` holds their pages, as a link says it."""
    head = ("objective", "paper", "loss of one pair", "needs besides the policy's log-probabilities")
    rows = (
        (
            f"[`{card.name}`]({folder}/{card.name}.md)",
            _cell(card.paper),
            _code(_short(card)),
            _needs(card),
        )
        for card in own_cards()
    )
    return _table(head, rows)


def facts(card: Card) -> list[tuple[str, str]]:
    """The card's single-valued entries, label and text, in reading order."""
    start = {
        "reference": "; all 0 where the policy equals the reference",
        "previous": "; all 0 where the policy, the previous iterate and the reference coincide",
        "none": "",
    }[card.start]
    why = WHY_OF[card.batch]
    needs = "; ".join(f"{need}: {why[need]}" for need in card.needs) or "the policy's log-probabilities only"
    samples = [("samples", f"{SAMPLES[card.batch]}; {JUDGES[card.judge]}")] if card.batch != "pairs" else []
    return [
        ("paper", f"{card.paper}; {card.equation}"),
        *samples,
        ("loss", card.formula),
        ("normalisation", card.normalisation),
        ("needs", needs + (f"; also {card.also_needs}" if card.also_needs else "")),
        ("implicit reward", card.reward + start),
        ("optimum", card.optimum or "none known"),
        ("bounds", card.bounds),
        ("verified", card.verified),
    ]


def show(name: str) -> str:
    """The card as plain text: formula, defaults, pitfalls. ValueError with the nearest name if it is unknown."""
    card = objective_class(name).card
    lines = [f"{card.name}: {card.title}", ""]
    lines += [f"{label + ':':<17}{text}" for label, text in facts(card)]
    selected, rows = _hyperparameters(card)
    if rows:
        lines += ["", f"hyper-parameters with {selected}:" if selected else "hyper-parameters:"]
    for row in rows:
        lines.append(f"  {row.name} = {_default(row.default)}  ({row.range})  {row.meaning}")
        lines += [f"      default from: {row.source}"] if row.source else []
    for title, entries in (("pitfalls", card.pitfalls), ("not to be confused", card.collisions)):
        lines += ["", f"{title}:", *(f"  - {entry}" for entry in entries)] if entries else []
    return "\n".join(lines)


def card_markdown(card: Card) -> str:
    """The card's part of an objective's page."""
    name = card.name
    parts = [
        "## Card",
        f"{card.title}. Generated from the code: `alignment objectives show {name}` prints the same, "
        f"`alignment objectives check {name}` proves it.",
        "```text\n" + card.formula.replace("; ", "\n") + "\n```",
    ]
    rows = [(label, _cell(text)) for label, text in facts(card) if label != "loss"]
    parts.append(_table(("", ""), [*rows, ("recipes", ", ".join(map(_code, _recipes(name))))]))
    selected, own = _hyperparameters(card)
    parts += [f"Hyper-parameters with `{selected}`:"] if selected else []
    cells = (
        (f"`{row.name}`", _default(row.default), _code(row.range), _cell(row.meaning), _cell(row.source))
        for row in own
    )
    parts.append(_table(("hyper-parameter", "default", "allowed", "meaning", "source of the default"), cells))
    for title, entries in (("Pitfalls", card.pitfalls), ("Not to be confused", card.collisions)):
        if entries:
            parts.append(f"{title}:\n\n" + "\n".join(f"* {_text(entry)}" for entry in entries))
    return "\n\n".join(parts)


def _recipes(name: str) -> list[str]:
    """Its quick starts, then those for real models."""
    folder = ROOT / "recipes"
    found = [*sorted(folder.glob(f"quickstart/{name}.yaml")), *sorted(folder.glob(f"{name}/*.yaml"))]
    return [str(path.relative_to(ROOT)) for path in found]


def letters_markdown() -> str:
    """Hyper-parameters that several objectives have under one name, each with its meaning there."""
    rows = [
        (row.name, card.name, row)
        for card in own_cards()  # of spo its own ones only: its variants show those of the base, too
        for row in (card.hyperparameters if card.name == "spo" else _hyperparameters(card)[1])
    ]
    counts = [name for name, _, _ in rows]
    shared = sorted((name, objective, row) for name, objective, row in rows if counts.count(name) > 1)
    cells = (
        (f"`{name}`", f"[{objective}](objectives/{objective}.md)", _cell(row.meaning), _default(row.default))
        for name, objective, row in shared
    )
    return _table(("name", "objective", "what it is there", "default"), cells)


def collisions_markdown() -> str:
    """What the cards say of names that mean something else elsewhere, by objective."""
    cards = [card for card in own_cards() if card.collisions]
    return "\n".join(
        f"* [{card.name}](objectives/{card.name}.md): {' '.join(map(_text, card.collisions))}" for card in cards
    )


def with_block(text: str, name: str, content: str, where: str) -> str:
    """`text` with `content` between the markers called `name`; ValueError if they are not there once each."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{where}: needs one {begin} followed by one {end}; what is generated goes between them")
    head, rest = text.split(begin)
    return f"{head}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def blocks() -> dict[str, dict[str, str]]:
    """File -> marker -> what belongs there."""
    found = {
        "docs/objectives.md": {"objectives": table_markdown("objectives")},
        "docs/glossary.md": {"letters": letters_markdown(), "collisions": collisions_markdown()},
    }
    return found | {f"docs/objectives/{card.name}.md": {"card": card_markdown(card)} for card in own_cards()}


def new_page(card: Card) -> str:
    """What the page of an objective is before anyone has written it."""
    sections = "".join(f"## {section}\n\nTODO\n\n" for section in SECTIONS)
    return NEW_PAGE.format(name=card.name, title=card.title, sections=sections.rstrip("\n") + "\n")


def write_docs(root: Path = ROOT) -> list[Path]:
    """Rewrite what is generated in the files under `root`; returns those that changed, new pages among them."""
    pages = {f"docs/objectives/{card.name}.md": card for card in own_cards()}
    changed = []
    for name, contents in blocks().items():
        path = root / name
        before = path.read_text(encoding="utf-8") if path.exists() or name not in pages else new_page(pages[name])
        text = before
        for marker, content in contents.items():
            text = with_block(text, marker, content, name)
        if text != before or not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            changed.append(path)
    return changed


if __name__ == "__main__":
    for written in write_docs():
        print(f"wrote {written}")
