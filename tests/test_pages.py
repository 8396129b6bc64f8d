"""The book's pages: all that the notebooks hold and nothing else, links that lead somewhere,
formulas, the API, and how it looks in a browser."""
import ast
import base64
import io
import json
import re
import shutil
import textwrap
import tokenize
from importlib.util import find_spec
from pathlib import Path
import nbformat
import pytest
from bs4 import BeautifulSoup
from ppc.pages import book_pages, exported_names

pytestmark = pytest.mark.slow

pytest_plugins = ['browser']  # the fixture
ROOT = Path(__file__).parent.parent
BOOK = {p.stem: nbformat.read(p, 4).cells for p in sorted((ROOT/'nbs').glob('*.ipynb'))}
MODULES = {f'ppc.{f.stem}': f.read_text() for f in (ROOT/'ppc').glob('[!_]*.py')}
PICTURES = ('image/png', 'image/jpeg')


@pytest.fixture(scope='module')
def docs(tmp_path_factory):
    "All pages, as `make docs` builds them."
    out = tmp_path_factory.mktemp('docs')
    book_pages(ROOT/'nbs', out)
    return out


@pytest.fixture(scope='module')
def pages(docs):
    "Stem -> the parsed page."
    return {p.stem: BeautifulSoup(p.read_text(encoding='utf-8'), 'html.parser')
            for p in docs.glob('*.html')}


def prose(cells):
    "The Markdown of a notebook without its code."
    return [re.sub(r'```.*?```|`[^`\n]*`', '', c.source, flags=re.S)
            for c in cells if c.cell_type == 'markdown']


def outputs(cells):
    return [o for c in cells if c.cell_type == 'code' for o in c.outputs]


def squeeze(text):
    return re.sub(r'\s+', '', text)


# --- what is there -------------------------------------------------------------------------------

def test_every_notebook_has_a_page(docs, pages):
    assert {*pages} == {*BOOK, 'names', 'api'} and (docs/'style.css').is_file()
    for stem, cells in BOOK.items():
        title = re.sub(r'[`*]', '', cells[0].source.splitlines()[0].lstrip('# '))
        assert pages[stem].h1.get_text().rstrip('#') == title
        assert title in pages[stem].title.get_text()


def shown_lines(cell):
    "The lines of a code cell that its page shows."
    lines = cell.source.splitlines() if cell.cell_type == 'code' else []
    if any(line.startswith('#| hide') for line in lines):
        return []
    return [line for line in lines if line.strip() and not line.startswith('#|')]


def test_text_and_code_are_all_there(pages):
    "Every line of shown code, and every word of prose."
    for stem, cells in BOOK.items():
        text = squeeze(pages[stem].main.get_text())
        for line in (line for c in cells for line in shown_lines(c)):
            assert squeeze(line) in text, (stem, line)
        for words in prose(cells):
            plain = re.sub(r'\$\$.*?\$\$|\$[^$]+\$|\[([^\]]*)\]\([^)]*\)', ' ', words, flags=re.S)
            for word in re.findall(r'[A-Za-z]{4,}', plain):
                assert word in text, (stem, word)
        assert '#|' not in text and 'default_exp' not in text or stem == '48_pages'


def test_hidden_code_is_hidden_its_outputs_are_not(pages):
    hidden = [c.source for c in BOOK['22_contrast'] if c.source.startswith('#| hide')]
    assert any('why = {' in source for source in hidden)
    assert 'why = {' not in pages['22_contrast'].main.get_text()
    tables = [t.get_text() for t in pages['22_contrast'].find_all('table')]
    assert any('smoother and nowhere zero' in t for t in tables)


def test_figures_are_those_of_the_notebooks(pages):
    "Byte by byte and in their order; each with a text that says where it stands."
    for stem, cells in BOOK.items():
        datas = [o.get('data', {}) for o in outputs(cells)]
        kinds = [next((k for k in PICTURES if k in data), None) for data in datas]
        wanted = [base64.b64decode(data[k]) for data, k in zip(datas, kinds) if k]
        found = pages[stem].select('figure img')
        assert [base64.b64decode(i['src'].split(',')[1]) for i in found] == wanted, stem
        assert all(i['alt'].startswith('Figure of the section: ') for i in found)
        assert all(len(i['alt']) > 25 for i in found)


def test_same_bytes_twice(tmp_path):
    for name in ('index', '20_prototypes', '22_contrast'):
        shutil.copy(ROOT/'nbs'/f'{name}.ipynb', tmp_path)
    first, second = (book_pages(tmp_path, tmp_path/out) for out in ('first', 'second'))
    assert [p.name for p in first] == [p.name for p in second] and len(first) == 6
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]


def definitions(source):
    "The public functions and classes of a module."
    return {n.name: n for n in ast.parse(source).body
            if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name[0] != '_'}


def test_every_exported_name_can_be_looked_up(pages):
    "What the modules define, read from the modules."
    found = {}
    for s in pages['names'].find_all('section'):
        for code in s.h2.find_all('code', recursive=False):
            found[code.get_text()] = {dt.get_text() for dt in s.select('dt:not(.section)')}
    wanted = {module: {*definitions(source)} for module, source in MODULES.items()}
    assert found == wanted and sum(map(len, wanted.values())) > 300
    href = pages['names'].find('a', string='PixelToPrototypeContrast')['href']
    assert href == '22_contrast.html#ppc.contrast.PixelToPrototypeContrast'
    anchor = pages['22_contrast'].find(id='ppc.contrast.PixelToPrototypeContrast')
    assert 'class PixelToPrototypeContrast' in anchor.parent.get_text()


# --- the API, compared with the modules ----------------------------------------------------------

@pytest.fixture(scope='module')
def entries(pages):
    "The entries of the API page by module and name; one search of the page for all of them."
    return {entry['id']: entry for entry in pages['api'].find_all(id=True)}


def head_comments(node, source):
    "The comments of a definition before its body."
    lines = source.splitlines()[node.lineno - 1:node.body[0].lineno - 1]
    lines = [line for line in lines if not line.strip().startswith('#')]
    indent = ' '*node.body[0].col_offset
    code = io.StringIO('\n'.join([*lines, f'{indent}pass']))
    return [t.string for t in tokenize.generate_tokens(code.readline) if t.type == tokenize.COMMENT]


def check_definition(shown, node, source):
    "Parameters, defaults, hints, bases, decorators, fields and comments are those of the module."
    found = ast.parse(textwrap.dedent(shown).rstrip() + '\n    pass').body[0]
    for part in ('name', 'args', 'returns', 'bases', 'decorator_list'):
        assert dump(getattr(found, part, None)) == dump(getattr(node, part, None)), node.name
    if isinstance(node, ast.ClassDef):
        assert dump(fields(found)) == dump(fields(node)), node.name
        for field in fields(node):
            for line in source.splitlines()[field.lineno - 1:field.end_lineno]:
                assert line in shown, (node.name, line)
    for comment in head_comments(node, source):
        assert comment in shown, (node.name, comment)


def dump(parts):
    "A part of a syntax tree as text, without its place."
    if isinstance(parts, list):
        return [dump(part) for part in parts]
    return ast.dump(parts) if isinstance(parts, ast.AST) else parts


def fields(node):
    return [n for n in node.body if isinstance(n, (ast.Assign, ast.AnnAssign))]


def public_methods(node):
    return [n for n in node.body if isinstance(n, ast.FunctionDef)
            and (n.name[0] != '_' or n.name in ('__init__', '__call__'))]


def test_every_exported_name_is_on_the_api_page(pages):
    "The page lists the names of nbdev's `__all__`, each with a link to the cell that defines it."
    total = 0
    for module, source in MODULES.items():
        tree = ast.parse(source)
        wanted = next(ast.literal_eval(n.value) for n in tree.body
                      if isinstance(n, ast.Assign) and n.targets[0].id == '__all__')
        section = pages['api'].find('section', id=module)
        assert sorted(h.get_text() for h in section.find_all('h3')) == sorted(wanted), module
        for link in section.select('h3 a'):
            name = link.get_text()
            stem, anchor = link['href'].split('.html#')
            cell = pages[stem].find(id=anchor).parent
            assert anchor == f'{module}.{name}' and name in cell.pre.get_text()
        description = ast.get_docstring(tree).replace('`', '')
        assert squeeze(section.p.get_text()) == squeeze(description), module
        total += len(wanted)
    assert total > 350


def test_signatures_are_those_of_the_modules(entries):
    methods = 0
    for module, source in MODULES.items():
        for name, node in definitions(source).items():
            shown = entries[f'{module}.{name}'].pre.get_text()
            if isinstance(node, ast.FunctionDef):
                check_definition(shown, node, source)
                continue
            head, *parts = re.split(r'\n\n(?=    (?:def|@))', shown)
            check_definition(head, node, source)
            for part, method in zip(parts, public_methods(node), strict=True):
                check_definition(part, method, source)
                assert not ast.get_docstring(method) or ast.get_docstring(method) in part
                methods += 1
    assert methods > 30


def test_docstrings_are_those_of_the_modules(entries):
    "Word by word; only Markdown's marks are gone."
    total = 0
    for module, source in MODULES.items():
        for name, node in definitions(source).items():
            entry = entries[f'{module}.{name}']
            text = ' '.join(e.get_text() for e in entry.find_all(recursive=False)[2:])
            docstring = ast.get_docstring(node)
            if docstring:
                assert re.findall(r'\w+', text) == re.findall(r'\w+', docstring), name
                total += 1
    assert total > 150


def test_bodies_are_not_on_the_api_page(pages):
    text = pages['api'].get_text()
    body = 'convert_with_local_state'
    assert body in MODULES['ppc.pages'] and body not in text


def names_of(source):
    "Name -> signature."
    return {n.name: n.signature for n in exported_names(source, 'page', 'ppc.module')}


def test_signatures_of_all_forms():
    "Decorators, a body on the same line, letters of several bytes, comments before a body."
    assert names_of('def f(x): return x  # twice') == {'f': 'def f(x):'}
    assert names_of("def é(x='é'): return x") == {'é': "def é(x='é'):"}
    assert names_of('@a\n@b(1)\ndef f(\n    x, # of it\n): # all\n    # why\n\n    return x') == {
        'f': '@a\n@b(1)\ndef f(\n    x, # of it\n): # all'}
    nested = 'class A:\n    @property\n    def b(self):\n        "C."\n        return 1\n'
    assert names_of(nested) == {'A': 'class A:\n\n    @property\n    def b(self):\n        "C."'}
    assert names_of('def f():\n    def g(): return 1\n    return g') == {'f': 'def f():'}
    assert names_of('A, B = 1, 2 # both\n_C = 3\nx.y = 4') == {'A': 'A, B = 1, 2 # both',
                                                            'B': 'A, B = 1, 2 # both'}


def test_placeholders_in_docstrings_are_shown(tmp_path):
    "`<name>` in a docstring is no HTML, neither on the API page nor in the index."
    shutil.copy(ROOT/'nbs'/'index.ipynb', tmp_path)
    book = json.loads((ROOT/'nbs'/'20_prototypes.ipynb').read_text())
    cell = next(c for c in book['cells'] if ''.join(c['source']).startswith('#| export\ndef '))
    cell['source'] = '#| export\ndef f(x):\n    "Write to <name>/x.png, a `<b>`."\n    return x'
    (tmp_path/'20_prototypes.ipynb').write_text(json.dumps(book))
    book_pages(tmp_path, tmp_path/'docs')
    for name in ('api', 'names'):
        text = (tmp_path/'docs'/f'{name}.html').read_text()
        soup = BeautifulSoup(text, 'html.parser')
        assert 'Write to <name>/x.png, a <b>.' in soup.get_text() and not soup.find(['name', 'b'])


# --- links ---------------------------------------------------------------------------------------

def test_links_lead_somewhere(docs, pages):
    ids = {name: [e['id'] for e in s.find_all(id=True)] for name, s in pages.items()}
    for name, s in pages.items():
        assert len(ids[name]) == len({*ids[name]}), name
        for a in s.find_all('a', href=True):
            if a['href'].startswith(('http://', 'https://')):
                continue
            file, _, anchor = a['href'].partition('#')
            target = Path(file).stem if file else name
            assert (docs/f'{target}.html').is_file(), (name, a['href'])
            assert not anchor or anchor in ids[target], (name, a['href'])
        assert [link['href'] for link in s.find_all('link')] == ['style.css']
        assert all(e['src'].startswith('data:') for e in s.find_all(src=True))


def test_index_and_api_are_in_the_navigation(pages):
    for stem, s in pages.items():
        links = s.find('nav', class_='chapters').find_all('a')
        assert [a['href'] for a in links[:2]] == ['names.html', 'api.html']
        here = [a['href'] for a in links if a.get('aria-current')]
        assert here == [f'{stem}.html']


def test_links_of_the_readme_fit(pages):
    "nbs/22_contrast.ipynb#There leads to the same place on 22_contrast.html."
    readme = (ROOT/'README.md').read_text()
    links = re.findall(r'\]\(nbs/(\w+)\.ipynb(?:#([^)]*))?\)', readme)
    assert any(anchor for _, anchor in links)
    for stem, anchor in links:
        assert stem in pages and (not anchor or pages[stem].find(id=anchor)), (stem, anchor)


def test_one_can_read_from_the_first_to_the_last(pages):
    stem, seen = 'index', []
    while stem:
        seen.append(stem)
        before = pages[stem].main.find_all('nav')[-1].find('a', rel='prev')
        after = pages[stem].find('a', rel='next')
        assert (Path(before['href']).stem if before else None) == (seen[-2:-1] or [None])[0]
        stem = after and Path(after['href']).stem
    assert seen == sorted(BOOK, key=lambda s: (s != 'index', s))


def test_names_in_code_letters_lead_to_their_definition(pages):
    assert pages['22_contrast'].find('a', href='12_views.html', string='12_views')
    chapters = [s for stem, s in pages.items() if stem in BOOK]
    for some in (chapters, [pages['api']]):
        links = {(a.get_text(), a['href']) for s in some for a in s.select('p a:has(code)')
                 if '#ppc.' in a['href']}
        assert len(links) > 10 and all(href.endswith(f'.{name}') for name, href in links)


# --- formulas ------------------------------------------------------------------------------------

def test_every_formula_is_one(pages):
    total = 0
    for stem, cells in BOOK.items():
        formula = re.compile(r'\$\$.+?\$\$|(?<!\$)\$[^$]+\$', re.S)
        wanted = sum(len(formula.findall(text)) for text in prose(cells))
        shown = [o.get('data', {}).get('text/html', '').count('<math') for o in outputs(cells)]
        assert len(pages[stem].find_all('math')) == wanted + sum(shown), stem
        total += wanted
    assert total > 150


def test_no_latex_is_left(pages):
    for stem, s in pages.items():
        for text in s.find_all(string=re.compile(r'[$\\]')):
            assert text.find_parent(['pre', 'code', 'script']), (stem, text)
        assert not s.find('merror')


def test_letters_keep_their_style(pages):
    "Bold, calligraphic and open letters are separate characters; a tag stands beside its formula."
    text = pages['22_contrast'].find(class_='formula').get_text()
    assert 'ℒ' in text and '(Eq. 1)' in text
    assert '𝐩' in pages['20_prototypes'].find(class_='formula').get_text()
    assert any('ℝ' in m.get_text() for m in pages['32_crf'].find_all('math'))


def test_a_broken_formula_is_named(tmp_path):
    for name in ('index', '20_prototypes'):
        shutil.copy(ROOT/'nbs'/f'{name}.ipynb', tmp_path)
    book = json.loads((tmp_path/'20_prototypes.ipynb').read_text())
    book['cells'][0]['source'].append('\nand $\\frac{1$')
    (tmp_path/'20_prototypes.ipynb').write_text(json.dumps(book))
    with pytest.raises(ValueError, match=r'20_prototypes.*\\frac\{1'):
        book_pages(tmp_path, tmp_path/'docs')
    assert not (tmp_path/'docs').exists()


# --- in a browser --------------------------------------------------------------------------------

LOOKS = """(() => {
    const box = e => e.getBoundingClientRect(), all = s => [...document.querySelectorAll(s)]
    return {
        outside: Math.max(0, document.documentElement.scrollWidth - innerWidth),
        pictures: [...document.images].filter(
            i => !i.complete || !i.naturalWidth || i.width > i.naturalWidth + 8).length,
        formulas: all('math').filter(m => box(m).height < 5 || box(m).width < 3).length,
        long: all('main p, main li').filter(e => box(e).width > 800).length,
        font: !all('math').length || [...document.fonts].some(f => f.status == 'loaded')}
})()"""


def test_pages_in_a_browser(docs, browser):
    """No error, nothing outside the window, pictures loaded and not enlarged, formulas with an
    extent and in their font, lines not too long."""
    for p in sorted(docs.glob('*.html')):
        browser.show(p, 400)
        for width in (400, 1400):
            browser.width(width)
            found = browser.evaluate(LOOKS)
            assert browser.errors == [], (p.name, width, browser.errors)
            assert found == dict(outside=0, pictures=0, formulas=0, long=0, font=True), \
                (p.name, width, found)


BOXES = """[...document.querySelectorAll('math, math *')].map(e => e.getBoundingClientRect())
    .map(r => [r.x, r.y, r.width, r.height].map(Math.round).join())"""
WHOLE_FONT = """new FontFace('Whole', 'url(%s)').load().then(f => {
    document.fonts.add(f)
    const textContent = 'math { font-family: Whole !important }'
    document.head.append(Object.assign(document.createElement('style'), {textContent}))
    return document.fonts.ready.then(() => 0)
})"""


def test_the_font_has_all_that_formulas_need(docs, browser):
    "Roots, bars and brackets of any size are as with the whole font."
    fonts = Path(find_spec('ziamath').origin).parent/'fonts'
    whole = (fonts/'STIXTwoMath-Regular.ttf').as_uri()
    for p in sorted(docs.glob('[0-9]*.html')):
        if '<math' not in p.read_text():
            continue
        browser.show(p, 1400)
        reduced = browser.evaluate(BOXES)
        browser.evaluate(WHOLE_FONT % whole)
        assert browser.evaluate(BOXES) == reduced, p.name


@pytest.mark.parametrize('anchor', [
    '22_contrast.html#What-each-option-is-worth-on-the-generated-scenes',
    '22_contrast.html#ppc.contrast.PixelToPrototypeContrast',
    'api.html#ppc.contrast',
    'api.html#ppc.contrast.PixelToPrototypeContrast'])
def test_an_anchor_is_scrolled_to(docs, browser, anchor):
    browser.show(docs/anchor, 1400)
    top = f"document.getElementById('{anchor.partition('#')[2]}').getBoundingClientRect().top"
    assert browser.evaluate('window.scrollY') > 500 and abs(browser.evaluate(top)) < 60


LOWEST_CONTRAST = """(() => {
    const linear = v => v <= .04045 ? v/12.92 : ((v + .055)/1.055)**2.4
    const light = colour => colour.match(/\\d+/g).slice(0, 3).map(v => linear(v/255))
        .reduce((s, v, i) => s + v*[.2126, .7152, .0722][i], 0)
    const spans = [...document.querySelectorAll('.code pre span')].filter(e => e.textContent.trim())
    return Math.min(...spans.map(e => {
        const front = getComputedStyle(e).color
        const back = getComputedStyle(e.closest('pre')).backgroundColor
        const [a, b] = [front, back].map(light).sort((x, y) => y - x)
        return (a + .05)/(b + .05)
    }))
})()"""


@pytest.mark.parametrize('stem', ['22_contrast', 'api'])
@pytest.mark.parametrize('dark', [False, True], ids=['light', 'dark'])
def test_code_can_be_read(docs, browser, dark, stem):
    "Every colour of the code stands out from its background (4.5 to 1, as the WCAG asks)."
    browser.show(docs/f'{stem}.html', 1400, dark)
    assert browser.evaluate(LOWEST_CONTRAST) > 4.5


SEEN = """[...document.querySelectorAll('.names div')].filter(e => e.offsetParent)
    .map(e => e.querySelector('dt').textContent)"""
TYPE = """(box => {
    box.value = '%s'
    box.dispatchEvent(new Event('input'))
})(document.querySelector('input'))"""
SECTIONS = "[...document.querySelectorAll('section')].filter(s => s.offsetParent).length"


def test_looking_up(docs, browser):
    browser.show(docs/'names.html', 1400)
    every = browser.evaluate(f'{SEEN}.length')
    browser.evaluate(TYPE % 'CROSS_PROTO')
    assert browser.evaluate(SEEN) == ['cross_prototype_loss'] and browser.evaluate(SECTIONS) == 1
    browser.evaluate(TYPE % '')
    assert browser.evaluate(f'{SEEN}.length') == every > 400
