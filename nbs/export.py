"After `nbdev_export`: the parameters cell of 50_run, and that notebook as a file of the package."
import json
import sys
from pathlib import Path
from ppc.parameters import parameters_cell


def write(path, book):
    path.write_text(json.dumps(book, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')


def main(root):
    path = root/'nbs'/'50_run.ipynb'
    book = json.loads(path.read_text(encoding='utf-8'))
    code = [c for c in book['cells'] if c['cell_type'] == 'code']
    cell = next(c for c in code if 'parameters' in c['metadata'].get('tags', []))
    made = parameters_cell()
    own = ''.join(cell['source']).split(made.split('\n')[0])[0]  # parameters of the notebook alone
    cell['source'] = (own + made).splitlines(keepends=True)
    write(path, book)
    for c in code:
        tags = {k: v for k, v in c['metadata'].items() if k == 'tags'}
        c.update(outputs=[], execution_count=None, metadata=tags)
    write(root/'ppc'/'run.ipynb', book)


if __name__ == '__main__':
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent)
