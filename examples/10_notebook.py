"""What this teaches: kernels in a notebook, in cells that can be edited and run again.

The lesson is 10_notebook.ipynb: open it with Jupyter. This file runs its cells one after the other in IPython, without
a server, and prints what each of them shows.
"""

import importlib.util
import json
import re
from pathlib import Path


def main() -> None:
    """Run the notebook."""
    if importlib.util.find_spec("IPython") is None:
        print("skipped: pip install 'torch-opkit[notebook]' brings IPython")
        return
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output
    from traitlets.config import Config

    shell = InteractiveShell(config=Config(HistoryManager={"enabled": False}), user_ns={})
    shell.display_formatter.active_types = ["text/plain", "text/html"]
    notebook = json.loads(Path(__file__).with_suffix(".ipynb").read_text())
    tables = 0
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] != "code":
            print(f"\n{text}\n")
            continue
        print(f">>> {text.splitlines()[0]} ...")
        with capture_output() as shown:
            done = shell.run_cell(text, store_history=True)
        assert done.success, f"{shown.stdout}{shown.stderr}"
        if done.result is not None:
            html = shell.display_formatter.format(done.result)[0].get("text/html", "")
            tables += "<table" in html
            print(re.sub(r"(?m)^", "    ", str(done.result)))
    assert tables >= 4, "ops, explanations and reports show themselves as tables"
    print(f"\n{tables} of the results are tables in a notebook")


if __name__ == "__main__":
    main()
