"""How the runs of a report were made: what their manifests say, but for times.

Times are left out, which differ from session to session, so that the same run gives the same page.
"""

import json
from html import escape

from tvlens.figures.report import markup
from tvlens.figures.report.contents import Block, Contents

_SHOWN = ("command", "lens", "config", "data", "seeds", "versions", "filters")


def origin(contents: Contents) -> list[Block]:
    """The manifest of every run."""
    blocks: list[Block] = []
    for run in contents.runs:
        name = "manifest.json" if run.name == "." else f"{run.name}/manifest.json"
        shown = {key: run.manifest[key] for key in _SHOWN if key in run.manifest}
        text = json.dumps(shown, indent=1, ensure_ascii=False)
        blocks += [
            markup.heading(run.command),
            markup.paragraph(
                f"`{name}` says what follows, and when each session ran and how long it took; the "
                "command's other settings are those of `config`."
            ),
            markup.folded("The manifest", f'<pre tabindex="0">{escape(text)}</pre>'),
        ]
    return blocks
