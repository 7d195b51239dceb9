"""Runs the notebooks of this folder and keeps what they show.

    pip install nbclient ipykernel ipywidgets
    python docs/execute.py

A digest of the code is kept beside the outputs, so that a test can tell outputs of other code.
"""

from hashlib import sha256
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from sagan_attn.files import write_whole

for path in sorted(Path(__file__).parent.glob("*.ipynb")):
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=3600, record_timing=False, resources={"metadata": {"path": path.parent}}).execute()
    code = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "executed_source": sha256(code.encode()).hexdigest(),
    }
    write_whole(path, (nbformat.writes(notebook) + "\n").encode())
    print(path)
