"README.md from nbs/index.ipynb: nbdev's preprocessing (hidden cells, links), nbconvert's markdown, pictures into nbs/images"
import re, sys
from pathlib import Path
import nbformat
from nbconvert import MarkdownExporter
from nbdev.config import get_config
from nbdev.serve import proc_nbs

def readme():
    "The text of README.md and its pictures, name -> bytes"
    config = get_config()
    nb = nbformat.read(proc_nbs(config.nbs_path, file_glob='index.ipynb', n_workers=0)/'index.ipynb', 4)
    nb.cells = [c for c in nb.cells if c.cell_type != 'raw' and 'include: false' not in c.source]     # front matter; what was `#| hide`
    for c in nb.cells:
        if c.cell_type == 'code': c.source = re.sub(r'(?m)^#\| .*\n?', '', c.source)
    body,resources = MarkdownExporter().from_notebook_node(nb, resources={'output_files_dir': 'nbs/images', 'unique_key': 'index'})
    return body.strip()+'\n', resources['outputs']

if __name__ == '__main__':
    root = Path(__file__).parent.parent
    text,pictures = readme()
    for name,data in pictures.items():
        (root/name).parent.mkdir(exist_ok=True)
        (root/name).write_bytes(data)
    (root/'README.md').write_text(text, encoding='utf-8')
    print(f'README.md: {len(text.splitlines())} lines, {len(pictures)} pictures', file=sys.stderr)
