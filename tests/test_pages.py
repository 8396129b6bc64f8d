"The book's pages: all that the notebooks hold and nothing else, links that lead somewhere, formulas, and how it looks in a browser."
import ast
import base64
import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path
import nbformat
import pytest
from browser import browser  # a fixture
from bs4 import BeautifulSoup
from ppc.pages import book_pages

ROOT = Path(__file__).parent.parent
BOOK = {p.stem: nbformat.read(p, 4).cells for p in sorted((ROOT/'nbs').glob('*.ipynb'))}


@pytest.fixture(scope='module')
def docs(tmp_path_factory):
    "All pages, as `make docs` builds them."
    out = tmp_path_factory.mktemp('docs')
    book_pages(ROOT/'nbs', out)
    return out


@pytest.fixture(scope='module')
def pages(docs): return {p.stem: BeautifulSoup(p.read_text(encoding='utf-8'), 'html.parser') for p in docs.glob('*.html')}


def prose(cells): return [re.sub(r'```.*?```|`[^`\n]*`', '', c.source, flags=re.S) for c in cells if c.cell_type == 'markdown']


# --- what is there ----------------------------------------------------------------------------------------------------------

def test_every_notebook_has_a_page(docs, pages):
    assert {*pages} == {*BOOK, 'names'} and (docs/'style.css').is_file()
    for stem, cells in BOOK.items():
        title = re.sub(r'[`*]', '', cells[0].source.splitlines()[0].lstrip('# '))
        assert pages[stem].h1.get_text().rstrip('#') == title and title in pages[stem].title.get_text()


def test_text_and_code_are_all_there(pages):
    "Every line of shown code, and every word of prose."
    squeezed = lambda text: re.sub(r'\s+', '', text)
    for stem, cells in BOOK.items():
        text = squeezed(pages[stem].main.get_text())
        for c in cells:
            lines = c.source.splitlines() if c.cell_type == 'code' else []
            hidden = any(l.startswith('#| hide') for l in lines)
            for line in lines:
                if line.startswith('#|') or not line.strip():
                    continue
                if not hidden:
                    assert squeezed(line) in text, (stem, line)
        for words in prose(cells):
            plain = re.sub(r'\$\$.*?\$\$|\$[^$]+\$|\[([^\]]*)\]\([^)]*\)', ' ', words, flags=re.S)
            for word in re.findall(r'[A-Za-z]{4,}', plain):
                assert word in text, (stem, word)
        assert '#|' not in text and 'default_exp' not in text or stem == '48_pages'


def test_hidden_code_is_hidden_its_outputs_are_not(pages):
    source = next(c.source for c in BOOK['22_contrast'] if c.source.startswith('#| hide') and 'why = {' in c.source)
    assert 'why = {' in source and 'why = {' not in pages['22_contrast'].main.get_text()
    assert any('smoother and nowhere zero' in t.get_text() for t in pages['22_contrast'].find_all('table'))


def test_figures_are_those_of_the_notebooks(pages):
    "Byte by byte and in their order; each with a text in its place."
    for stem, cells in BOOK.items():
        kinds = [next((k for k in ('image/png', 'image/jpeg') if k in o.get('data', {})), None) for c in cells if c.cell_type == 'code' for o in c.outputs]
        datas = [o.data[k] for o, k in zip((o for c in cells if c.cell_type == 'code' for o in c.outputs), kinds) if k]
        found = pages[stem].select('figure img')
        assert [base64.b64decode(i['src'].split(',')[1]) for i in found] == [base64.b64decode(d) for d in datas], stem
        assert all(i['alt'].startswith('Figure of the section: ') and len(i['alt']) > 25 for i in found)


def test_same_bytes_twice(tmp_path):
    for name in ('index', '20_prototypes', '22_contrast'):
        shutil.copy(ROOT/'nbs'/f'{name}.ipynb', tmp_path)
    once, twice = (book_pages(tmp_path, tmp_path/out) for out in ('once', 'twice'))
    assert [p.read_bytes() for p in once] == [p.read_bytes() for p in twice] and len(once) == 5


def test_every_exported_name_can_be_looked_up(pages):
    "What the modules define, read from the modules."
    found = {c.get_text(): {dt.get_text() for dt in s.select('dt:not(.section)')} for s in pages['names'].find_all('section') for c in s.h2.find_all('code', recursive=False)}
    want = {}
    for f in (ROOT/'ppc').glob('[!_]*.py'):
        names = {n.name for n in ast.parse(f.read_text()).body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name[0] != '_'}
        want[f'ppc.{f.stem}'] = names
    assert found == want and sum(map(len, want.values())) > 300
    place = pages['names'].find('a', string='PixelToPrototypeContrast')['href']
    assert place == '22_contrast.html#ppc.contrast.PixelToPrototypeContrast'
    assert 'class PixelToPrototypeContrast' in pages['22_contrast'].find(id='ppc.contrast.PixelToPrototypeContrast').parent.get_text()


# --- links ------------------------------------------------------------------------------------------------------------------

def test_links_lead_somewhere(docs, pages):
    ids = {name: [e['id'] for e in s.find_all(id=True)] for name, s in pages.items()}
    for name, s in pages.items():
        assert len(ids[name]) == len({*ids[name]}), name
        for a in s.find_all('a', href=True):
            if a['href'].startswith(('http://', 'https://')):
                continue
            file, _, place = a['href'].partition('#')
            target = Path(file).stem if file else name
            assert (docs/f'{target}.html').is_file(), (name, a['href'])
            assert not place or place in ids[target], (name, a['href'])
        assert [l['href'] for l in s.find_all('link')] == ['style.css'] and not [e for e in s.find_all(src=True) if not e['src'].startswith('data:')]


def test_links_of_the_readme_fit(pages):
    "nbs/22_contrast.ipynb#There leads to the same place on 22_contrast.html."
    links = re.findall(r'\]\(nbs/(\w+)\.ipynb(?:#([^)]*))?\)', (ROOT/'README.md').read_text())
    assert any(place for _, place in links)
    for stem, place in links:
        assert stem in pages and (not place or pages[stem].find(id=place)), (stem, place)


def test_one_can_read_from_the_first_to_the_last(pages):
    stem, seen = 'index', []
    while stem:
        seen.append(stem)
        nav, after = pages[stem].main.find_all('nav')[-1], pages[stem].find('a', rel='next')
        before = nav.find('a', rel='prev')
        assert (Path(before['href']).stem if before else None) == (seen[-2] if len(seen) > 1 else None)
        stem = after and Path(after['href']).stem
    assert seen == sorted(BOOK, key=lambda s: (s != 'index', s))


def test_names_in_code_letters_lead_to_their_place(pages):
    assert pages['22_contrast'].find('a', href='12_views.html', string='12_views')
    links = {(a.get_text(), a['href']) for s in pages.values() for a in s.select('p a:has(code)') if '#ppc.' in a['href']}
    assert len(links) > 10 and all(href.endswith(f'.{name}') for name, href in links)


# --- formulas ---------------------------------------------------------------------------------------------------------------

def test_every_formula_is_one(pages):
    total = 0
    for stem, cells in BOOK.items():
        want = sum(len(re.findall(r'\$\$.+?\$\$|(?<!\$)\$[^$]+\$', text, re.S)) for text in prose(cells))
        shown = sum(o.data['text/html'].count('<math') for c in cells if c.cell_type == 'code' for o in c.outputs if 'text/html' in o.get('data', {}))
        assert len(pages[stem].find_all('math')) == want + shown, stem
        total += want
    assert total > 150


def test_no_latex_is_left(pages):
    for stem, s in pages.items():
        for text in s.find_all(string=re.compile(r'[$\\]')):
            assert text.find_parent(['pre', 'code', 'script']), (stem, text)
        assert not s.find('merror')


def test_letters_keep_their_style(pages):
    "Bold, calligraphic and open letters are letters of their own; a tag stands beside its formula."
    text = pages['22_contrast'].find(class_='formula').get_text()
    assert 'ℒ' in text and '(Eq. 1)' in text
    assert '𝐩' in pages['20_prototypes'].find(class_='formula').get_text() and any('ℝ' in m.get_text() for m in pages['32_crf'].find_all('math'))


def test_a_broken_formula_is_named(tmp_path):
    for name in ('index', '20_prototypes'):
        shutil.copy(ROOT/'nbs'/f'{name}.ipynb', tmp_path)
    book = json.loads((tmp_path/'20_prototypes.ipynb').read_text())
    book['cells'][0]['source'].append('\nand $\\frac{1$')
    (tmp_path/'20_prototypes.ipynb').write_text(json.dumps(book))
    with pytest.raises(ValueError, match=r'20_prototypes.*\\frac\{1'):
        book_pages(tmp_path, tmp_path/'docs')
    assert not (tmp_path/'docs').exists()


# --- in a browser -----------------------------------------------------------------------------------------------------------

LOOKS = """({
    beside: Math.max(0, document.documentElement.scrollWidth - innerWidth),
    pictures: [...document.images].filter(i => !i.complete || !i.naturalWidth || i.width > i.naturalWidth + 8).length,
    formulas: [...document.querySelectorAll('math')].filter(m => m.getBoundingClientRect().height < 5 || m.getBoundingClientRect().width < 3).length,
    long: [...document.querySelectorAll('main p, main li')].filter(e => e.getBoundingClientRect().width > 800).length,
    font: !document.querySelector('math') || [...document.fonts].some(f => f.status == 'loaded')})"""


def test_pages_in_a_browser(docs, browser):
    "Nothing in the console, nothing beside the page, pictures there and not enlarged, formulas with an extent and in their font, lines not too long."
    for p in sorted(docs.glob('*.html')):
        browser.show(p, 400)
        for width in (400, 1400):
            browser.width(width)
            found = browser.ask(LOOKS)
            assert browser.errors == [] and found == dict(beside=0, pictures=0, formulas=0, long=0, font=True), (p.name, width, browser.errors, found)


def test_the_font_has_all_that_formulas_need(docs, browser):
    "Roots, bars and brackets of any size are as with the whole font."
    places = "[...document.querySelectorAll('math, math *')].map(e => e.getBoundingClientRect()).map(r => [r.x, r.y, r.width, r.height].map(Math.round).join())"
    whole = (Path(find_spec('ziamath').origin).parent/'fonts'/'STIXTwoMath-Regular.ttf').as_uri()
    for p in sorted(docs.glob('[0-9]*.html')):
        if '<math' not in p.read_text():
            continue
        browser.show(p, 1400)
        cut = browser.ask(places)
        browser.ask(f"""new FontFace('Whole', 'url({whole})').load().then(f => {{ document.fonts.add(f); document.head.append(Object.assign(
            document.createElement('style'), {{textContent: 'math {{ font-family: Whole !important }}'}})); return document.fonts.ready.then(() => 0) }})""")
        assert browser.ask(places) == cut, p.name


def test_a_place_is_scrolled_to(docs, browser):
    for place in ('What-each-option-is-worth-on-the-generated-scenes', 'ppc.contrast.PixelToPrototypeContrast'):
        browser.show(f'{docs}/22_contrast.html#{place}', 1400)
        assert browser.ask('window.scrollY') > 500 and abs(browser.ask(f"document.getElementById('{place}').getBoundingClientRect().top")) < 60


@pytest.mark.parametrize('dark', [False, True], ids=['light', 'dark'])
def test_code_can_be_read(docs, browser, dark):
    "Every colour of the code stands out from what is behind it (4.5 to 1, as the WCAG asks)."
    browser.show(docs/'22_contrast.html', 1400, dark)
    low = browser.ask("""(() => {
        const light = c => c.match(/\\d+/g).slice(0, 3).map(v => v/255).map(v => v <= .04045 ? v/12.92 : ((v + .055)/1.055)**2.4).reduce((s, v, i) => s + v*[.2126, .7152, .0722][i], 0)
        return Math.min(...[...document.querySelectorAll('.code pre span')].filter(e => e.textContent.trim()).map(e => {
            const [a, b] = [light(getComputedStyle(e).color), light(getComputedStyle(e.closest('pre')).backgroundColor)].sort((x, y) => y - x)
            return (a + .05)/(b + .05) }))
    })()""")
    assert low > 4.5


def test_looking_up(docs, browser):
    browser.show(docs/'names.html', 1400)
    seen = "[...document.querySelectorAll('.names div')].filter(e => e.offsetParent).map(e => e.querySelector('dt').textContent)"
    every = browser.ask(f'{seen}.length')
    browser.ask("(b => { b.value = 'CROSS_PROTO'; b.dispatchEvent(new Event('input')) })(document.querySelector('input'))")
    assert browser.ask(seen) == ['cross_prototype_loss'] and browser.ask("[...document.querySelectorAll('section')].filter(s => s.offsetParent).length") == 1
    browser.ask("(b => { b.value = ''; b.dispatchEvent(new Event('input')) })(document.querySelector('input'))")
    assert browser.ask(f'{seen}.length') == every > 400
