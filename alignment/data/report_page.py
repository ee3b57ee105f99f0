"""The data report as one self-contained page, with plots inline. Numbers are `report.py`'s; no row's text is here."""

from __future__ import annotations

import io
from pathlib import Path

from alignment.data.report import DataReport, Histogram, cut_off, duplicates, length_bias
from alignment.files import write_text

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Data report: {{ report.recipe }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; } td, th { text-align: left; padding: .2rem .9rem .2rem 0; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); gap: 1rem; }
svg { width: 100%; height: auto; } .bad { color: #b00020; }
</style></head><body>
<h1>Data report</h1>
<p><code>{{ report.recipe }}</code>, <code>data.max_length</code> {{ report.max_length }}</p>
{% if not report.ok %}<p class="bad">Training would refuse this data.</p>{% endif %}
{% for set in report.sets %}
<h2>{{ set.role }}</h2>
<p>{{ set.used }} of {{ set.read }} rows can be used.</p>
{% if set.unusable %}<table><tr><th>reason</th><th>rows</th><th>first ones</th></tr>
{% for bad in set.unusable %}
<tr><td>{{ bad.reason }}</td><td>{{ bad.rows }}</td><td>{{ bad.where | join(", ") }}: {{ bad.detail }}</td></tr>
{% endfor %}</table>{% endif %}
{% if set.used %}
<ul><li>{{ bias(set) }}</li>
<li>{{ cut(set, report.max_length) }}</li>
<li>{{ duplicates(set) }}</li>
{% for line in set.markers + set.labels + set.notes | list %}<li>{{ line }}</li>
{% endfor %}</ul>
<div class="plots">
{% for drawn in set.lengths + ([set.difference] if set.difference else []) %}
<figure>{{ plot(drawn) | safe }}<figcaption>{{ drawn.title }}: {{ drawn.brief }}</figcaption></figure>
{% endfor %}</div>
{% endif %}{% endfor %}
{% if report.shared_prompts is not none %}
<h2>Shared by train and eval</h2>
<p>{{ report.shared_prompts }} rows of train have a prompt of eval, {{ report.shared_rows }} are whole rows of it
(<code>data.overlap</code>: {{ report.overlap }}).</p>{% endif %}
</body></html>
"""


def write_page(report: DataReport, file: Path) -> None:
    """Write the page whole or not at all."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    sentences = {"bias": length_bias, "cut": cut_off, "duplicates": duplicates}
    write_text(file, environment.from_string(_PAGE).render(report=report, plot=plot, **sentences))


def plot(drawn: Histogram) -> str:
    """A histogram as inline SVG."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 2.6), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    widths = [high - low for low, high in zip(drawn.edges, drawn.edges[1:], strict=False)]
    axes.bar(drawn.edges[:-1], drawn.counts, width=widths, align="edge", color="#4472c4", edgecolor="white")
    axes.set_xlabel(drawn.title)
    axes.set_ylabel("pairs")
    axes.spines[["top", "right"]].set_visible(False)
    image = io.StringIO()
    figure.savefig(image, format="svg", metadata={"Date": None})
    text = image.getvalue()
    return text[text.index("<svg") :]
