"""Run the Python blocks of flax's guides that mention BatchNorm: `guides.py OURS OUT GUIDE...`.

OURS is 1 for our batch norms in the place of flax's. OUT gets, as JSON, for every guide (and for
every tab, where it shows code side by side) the blocks that raised an error, with its type, and how
many of those that mention BatchNorm did not.
"""

import contextlib
import io
import json
import re
import sys
import textwrap
import warnings
from pathlib import Path

import flax.linen

RST = re.compile(
    r"^( *)\.\. (testsetup|testcode|code-block:: python|codediff)\b.*\n((?:\1 +.*\n|[ \t]*\n)*)",
    re.MULTILINE,
)
MARKDOWN = re.compile(r"^```(?:python|\{code-cell\})[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
NO_PYTHON = re.compile(r"^(:\w.*|[!%].*|---)\n", re.MULTILINE)


def blocks(guide):
    """The code of a guide, block by block, each in as many versions as it has tabs."""
    text = guide.read_text()
    if guide.suffix == ".md":
        return [[NO_PYTHON.sub("", block)] for block in MARKDOWN.findall(text)]
    found = []
    for _, kind, body in RST.findall(text):
        body = re.sub(r"^ *:\w+:.*\n", "", body, flags=re.MULTILINE)
        tabs = re.split(r"^ *---\n", body, flags=re.MULTILINE) if kind == "codediff" else [body]
        found.append([textwrap.dedent(tab) for tab in tabs])
    return found


def run(guide, code):
    """What failed, and how many blocks with BatchNorm did not."""
    names, failed, good = {"__name__": "guide"}, [], 0
    for number, block in enumerate(code):
        try:
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exec(compile(block, f"{guide.name}:{number}", "exec"), names)
            good += "BatchNorm" in block
        except Exception as error:
            failed.append([number, type(error).__name__])
    return {"failed": failed, "good": good}


def main(ours, out, *guides):
    if ours == "1":
        import our_norms

        our_norms.put_ours_in()
    results = {}
    for guide in map(Path, guides):
        found = blocks(guide)
        for tab in range(max(map(len, found), default=0)):
            code = [tabs[min(tab, len(tabs) - 1)] for tabs in found]
            if any("BatchNorm(" in block for block in code):
                results[f"{guide} {tab}"] = run(guide, code)
    tested = flax.linen.BatchNorm.__module__
    Path(out).write_text(json.dumps({"tested": tested, "results": results}))


if __name__ == "__main__":
    main(*sys.argv[1:])
