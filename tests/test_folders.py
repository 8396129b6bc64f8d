"Folders from spreadsheets and class folders, archives that are not trusted, and the report."
import errno
import io
import os
import pathlib
import random
import shutil
import stat
import tarfile
import types
import unicodedata
import zipfile
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from ppc.data import DataError, TagFolder, check, read_mask, write_mask
from ppc.folders import (
    class_counts,
    folder_report,
    link_file,
    make_folder,
    mask_remarks,
    unpack,
    write_folder,
)


def fails(call, *words):
    "The call raises a `DataError` whose message holds all the words."
    with pytest.raises(DataError) as e:
        call()
    for word in words:
        assert word in str(e.value), str(e.value)


def tree(folder):
    "Path -> text of each file, without the marks of unpacked archives."
    files = [p for p in sorted(folder.rglob('*')) if p.is_file()]
    return {str(p.relative_to(folder)): p.read_text()
            for p in files if not p.name.endswith('.unpacked')}


def member(name, kind=tarfile.REGTYPE, to='', text='hello'):
    "A member of a tar archive and its bytes."
    m = tarfile.TarInfo(name)
    m.type, m.linkname = kind, to
    m.size = len(text) if kind == tarfile.REGTYPE else 0
    return m, io.BytesIO(text.encode())


def tar(path, *members, mode='w'):
    with tarfile.open(path, mode) as t:
        for m, data in members:
            t.addfile(m, data if m.size else None)
    return path


def zipped(path, *members):
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z:
        for name, text in members:
            z.writestr(name, text)
    return path


@pytest.mark.parametrize('name, mode', [
    ('a.tar', 'w'),
    ('a.tar.gz', 'w:gz'),
    ('a.tgz', 'w:gz'),
    ('a.tar.bz2', 'w:bz2'),
    ('a.tar.xz', 'w:xz'),
])
def test_unpack_tar(tmp_path, name, mode):
    members = [member('./d', tarfile.DIRTYPE), member('./d/a.txt', text='one'),
               member('b c.txt', text='two'), member('empty', text='')]
    archive = tar(tmp_path/name, *members, mode=mode)
    assert unpack(archive, tmp_path/'out') == tmp_path/'out'
    assert tree(tmp_path/'out') == {'d/a.txt': 'one', 'b c.txt': 'two', 'empty': ''}


def test_unpack_zip(tmp_path):
    members = [('d/', ''), ('d/a.txt', 'one'), ('from\\windows.txt', 'two')]
    archive = zipped(tmp_path/'a.ZIP', *members)
    unpack(archive, tmp_path/'out')
    assert tree(tmp_path/'out') == {'d/a.txt': 'one', 'from/windows.txt': 'two'}


BAD_NAMES = ['../evil', 'a/../../evil', 'a/../b', '/evil', '//evil', 'C:/evil', 'c:evil',
             '..\\evil', '\\evil', '\\\\server\\evil', 'a\nb']


@pytest.mark.parametrize('name', BAD_NAMES)
def test_members_that_lead_out(tmp_path, name):
    "Nothing at all is written, not even the valid member before."
    box = tmp_path/'box'
    archives = [zipped(tmp_path/'a.zip', ('good', 'good'), (name, 'evil')),
                tar(tmp_path/'a.tgz', member('good'), member(name), mode='w:gz')]
    for archive in archives:
        fails(lambda archive=archive: unpack(archive, box/'out'), str(archive), repr(name))
        assert not box.exists() and not any(p.name == 'evil' for p in tmp_path.rglob('*'))


@pytest.mark.parametrize('kind, to', [
    (tarfile.SYMTYPE, '../secret'),
    (tarfile.SYMTYPE, '/etc/passwd'),
    (tarfile.SYMTYPE, '.'),
    (tarfile.SYMTYPE, 'bad'),
    (tarfile.SYMTYPE, 'nothing'),
    (tarfile.LNKTYPE, '../secret'),
    (tarfile.LNKTYPE, '/etc/passwd'),
    (tarfile.LNKTYPE, 'bad'),
    (tarfile.CHRTYPE, ''),
    (tarfile.BLKTYPE, ''),
    (tarfile.FIFOTYPE, ''),
])
def test_links_and_devices(tmp_path, kind, to):
    (tmp_path/'secret').write_text('secret')
    archive = tar(tmp_path/'a.tar', member('good'), member('bad', kind, to))
    fails(lambda: unpack(archive, tmp_path/'out'), str(archive), "'bad'")
    assert not (tmp_path/'out').exists()


def test_a_folder_made_by_a_link(tmp_path):
    "A link that leads out of the folder, then a file through it: rejected."
    archive = tar(tmp_path/'a.tar', member('d', tarfile.SYMTYPE, '..'), member('d/evil'))
    fails(lambda: unpack(archive, tmp_path/'out'), "'d'")
    assert not (tmp_path/'evil').exists()


def test_links_inside_become_copies(tmp_path):
    members = [member('d/a', text='one'), member('e/s', tarfile.SYMTYPE, '../d/a'),
               member('h', tarfile.LNKTYPE, 'd/a')]
    unpack(tar(tmp_path/'a.tar', *members), tmp_path/'out')
    assert tree(tmp_path/'out') == {'d/a': 'one', 'e/s': 'one', 'h': 'one'}
    assert not any(p.is_symlink() for p in (tmp_path/'out').rglob('*'))


def test_link_in_a_zip(tmp_path):
    link = zipfile.ZipInfo('link')
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    archive = zipped(tmp_path/'a.zip', ('good', 'good'), (link, '/etc/passwd'))
    fails(lambda: unpack(archive, tmp_path/'out'), str(archive), "'link'")
    assert not (tmp_path/'out').exists()


@pytest.mark.parametrize('name', ['a.zip', 'a.tar', 'a.tar.gz'])
def test_damaged_archives(tmp_path, name):
    "Cut off, empty, or text: rejected; a complete archive is then unpacked over the remains."
    archive, out = tmp_path/name, tmp_path/'out'
    text = random.Random(0).randbytes(3000).hex()
    if name == 'a.zip':
        zipped(archive, ('a', text), ('b', text))
    else:
        mode = 'w:gz' if name.endswith('gz') else 'w'
        tar(archive, member('a', text=text), member('b', text=text), mode=mode)
    whole = archive.read_bytes()
    for part in (whole[:len(whole)//2], b'', b'<html>not found</html>'):
        archive.write_bytes(part)
        fails(lambda: unpack(archive, out), str(archive), 'cannot be unpacked')
    archive.write_bytes(whole)
    unpack(archive, out)
    assert tree(out) == {'a': text, 'b': text}
    fails(lambda: unpack(tmp_path/'none.zip', out), 'none.zip', 'missing')


def test_wrong_checksum_in_a_zip(tmp_path):
    "A changed byte: earlier members may stay, but the archive does not count as unpacked."
    archive = tmp_path/'a.zip'
    with zipfile.ZipFile(archive, 'w') as z:
        z.writestr('a', 'one')
        z.writestr('b', 'two')
    good = archive.read_bytes()
    archive.write_bytes(good.replace(b'two', b'tww'))
    fails(lambda: unpack(archive, tmp_path/'out'), str(archive))
    assert not (tmp_path/'out'/'b').exists()
    assert not list((tmp_path/'out').glob('.*'))
    archive.write_bytes(good)
    unpack(archive, tmp_path/'out')
    assert tree(tmp_path/'out') == {'a': 'one', 'b': 'two'}


def test_unpacked_once(tmp_path):
    "A second call writes nothing; a changed archive is unpacked again; two may share a folder."
    archive, out = zipped(tmp_path/'a.zip', ('a', 'one')), tmp_path/'out'
    unpack(archive, out)
    (out/'a').write_text('mine')
    unpack(archive, out)
    unpack(tar(tmp_path/'b.tar', member('b', text='two')), out)
    assert tree(out) == {'a': 'mine', 'b': 'two'}
    unpack(zipped(archive, ('a', 'three')), out)
    assert tree(out) == {'a': 'three', 'b': 'two'}


def test_links_in_the_target_are_not_written_through(tmp_path):
    "The user's originals stay unchanged."
    (tmp_path/'original').write_text('mine')
    (tmp_path/'out').mkdir()
    (tmp_path/'out'/'a').symlink_to(tmp_path/'original')
    unpack(zipped(tmp_path/'a.zip', ('a', 'one')), tmp_path/'out')
    assert (tmp_path/'original').read_text() == 'mine'
    assert tree(tmp_path/'out') == {'a': 'one'}


def test_an_archive_larger_than_the_disk(tmp_path, monkeypatch):
    "The size is checked before a byte is written."
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: types.SimpleNamespace(free=1000))
    archive = tar(tmp_path/'a.tar', member('a'), member('b', text='x'*1000))
    fails(lambda: unpack(archive, tmp_path/'out'), 'a.tar', 'needs')
    assert not list((tmp_path/'out').iterdir())


# Photographs with a spreadsheet, or in class folders.

def photo(path, colour=0):
    "A small picture of its own colour at this path."
    path.parent.mkdir(parents=True, exist_ok=True)
    fmt = 'PNG' if path.suffix.lower() == '.png' else 'JPEG'
    Image.new('RGB', (12, 8), (colour, 255 - colour, 7)).save(path, fmt)


@pytest.fixture
def pictures(tmp_path):
    "A folder of four photographs."
    for k, name in enumerate(['a.jpg', 'b c.JPG', 'd.png', 'sub/e.jpeg']):
        photo(tmp_path/'pictures'/name, 60*k)
    return tmp_path/'pictures'


def made(pictures, text, **options):
    "Make a folder with a spreadsheet of this text; return its tags by id, and the counts."
    box = pictures.parent
    (box/'list.csv').write_bytes(text if isinstance(text, bytes) else text.encode())
    counts = make_folder(box/'out', pictures, box/'list.csv', **options)
    return tags_of(box/'out'), counts


def tags_of(root):
    "Id -> names of its tags, as `TagFolder` reads them."
    folder = TagFolder(root)
    check(folder)
    names = folder.classes[1:]
    return {i: {name for name, present in zip(names, row) if present}
            for i, row in zip(folder.ids, folder.tags)}


WANT = {'a': {'cat', 'dog'}, 'b c': {'dog'}, 'd': set(), 'e': {'cat'}}
SHEETS = {
    'spaces': 'image,tags\na.jpg,cat dog\nb c.JPG,dog\nd.png,\nsub/e.jpeg,cat\n',
    'commas in quotes':
        'image,tags\na.jpg,"cat, dog"\nb c.JPG,dog\nd.png,""\nsub/e.jpeg,cat\n',
    'commas without': 'image,tags\na.jpg,cat,dog\nb c.JPG,dog\nd.png\nsub/e.jpeg,cat\n',
    'semicolons': 'image,tags\na.jpg,cat;dog\nb c.JPG,dog;\nd.png,\nsub/e.jpeg,cat\n',
    'Excel in Europe':
        b'\xef\xbb\xbfBild;Inhalt\r\na.jpg;cat dog\r\nb c.JPG;"dog"\r\nd.png;\r\n'
        b'sub\\e.jpeg;cat, cat\r\n;\r\n\r\n',
    'without endings, empty columns':
        'image,tags,,\na,cat dog,,\nb c,dog,,\nd,,,\ne,cat,,\n,,,\n',
    'other endings': 'image,tags\na.JPG,cat dog\n./b c.jpg,dog\nd.png,\nsub/e.jpg,cat\n',
    'a row for each tag':
        'file,label\na.jpg,cat\nb c.JPG,dog\nd.png,\na.jpg,dog\nsub/e.jpeg,cat\nsub/e.jpeg,cat\n',
    'the tag background':
        'image,tags\na.jpg,cat dog\nb c.JPG,dog background\nd.png,background\nsub/e.jpeg,cat\n',
    'columns of 0 and 1': 'image,cat,dog\na.jpg,1,1\nb c.JPG,0,1\nd.png,0,0\nsub/e.jpeg,1,0\n',
    'columns of x': 'image;dog;cat;;\r\na.jpg;x;X\r\nb c.JPG;x\r\nd.png\r\ne;;x;;;\r\n',
    'a gap between the columns':
        'image,cat,,dog\na.jpg,1,,1\nb c.JPG,0,,1\nd.png,0\nsub/e.jpeg,1\n',
    'columns of words':
        'image,cat,dog\na.jpg,TRUE,yes\nb c.JPG,False,True\nd.png,no,\nsub/e.jpeg,Y,n\n',
    'columns of numbers':
        'image,cat,dog\na.jpg,1.0,1.0\nb c.JPG,-1,1\nd.png,0.0,-1\nsub/e.jpeg,1,0\n',
}


@pytest.mark.parametrize('name', SHEETS)
def test_spreadsheets(pictures, name):
    got, counts = made(pictures, SHEETS[name])
    assert got == WANT
    assert TagFolder(pictures.parent/'out').classes == ['background', 'cat', 'dog']
    assert counts == {'images': 4, 'without tags': 1, 'masks': 0, 'left out': 0, 'other files': 0}
    table, problems = folder_report(pictures.parent/'out')
    assert not problems
    want = {'images': 4, 'masks': 0, 'saliency': 0, 'cat': 2, 'dog': 2}
    assert table['train'].to_dict() == want


def test_one_class(pictures):
    "Two columns with only marks in the second: its header is the class. 1 and 2 may be tags."
    got, _ = made(pictures, 'image,broken glass\na.jpg,1\nd.png,0\n')
    assert got == {'a': {'broken_glass'}, 'd': set()}
    got, _ = made(pictures, 'image,kind\na.jpg,1\nd.png,2\n')
    assert got == {'a': {'1'}, 'd': {'2'}}


def links(folder):
    "Path -> inode and content of each link in a folder."
    paths = [p for p in sorted(folder.rglob('*')) if p.is_symlink()]
    return {p: (p.lstat().st_ino, p.read_bytes()) for p in paths}


def test_links_and_photographs_left_out(pictures):
    """Originals are linked, photographs without a row are left out and counted.

    A second run changes nothing; when a row is removed its link is removed."""
    (pictures/'notes.txt').write_text('')
    photo(pictures/'.hidden'/'z.jpg')
    photo(pictures/'._a.jpg')
    got, counts = made(pictures, 'image,tags\na.jpg,cat\nd.png,dog\n')
    out = pictures.parent/'out'
    assert counts == {'images': 2, 'without tags': 0, 'masks': 0, 'left out': 2, 'other files': 1}
    link = out/'JPEGImages'/'a.jpg'
    assert link.resolve() == pictures/'a.jpg' and link.is_symlink()
    before = links(out)
    assert made(pictures, 'image,tags\na.jpg,cat\nd.png,dog\n') == (got, counts)
    assert before == links(out)
    assert made(pictures, 'image,tags\nd.png,dog\n')[0] == {'d': {'dog'}}
    assert [p.name for p in (out/'JPEGImages').iterdir()] == ['d.png']
    assert (pictures/'a.jpg').is_file()


def test_given_classes(pictures):
    "In the order of the masks' numbers; a tag that is not among them is an error."
    made(pictures, 'image,tags\na.jpg,dog\n', classes=['dog', 'bird'])
    assert TagFolder(pictures.parent/'out').classes == ['background', 'dog', 'bird']
    made(pictures, 'image,tags\na.jpg,dog\n', classes=['background', 'dog', 'bird'])
    assert TagFolder(pictures.parent/'out').classes == ['background', 'dog', 'bird']
    misspelt = 'image,tags\na.jpg,dogg\n'
    fails(lambda: made(pictures, misspelt, classes=['dog', 'bird']),
          'list.csv', 'a.jpg', "'dogg'", 'dog bird')


BAD = {
    'no header': ('a.jpg,cat\nb c.JPG,dog\n', 'line 1', 'header'),
    'one column': ('image\na.jpg\n', 'line 1', 'header'),
    'empty': ('', 'line 1', 'header'),
    'only a header': ('image,tags\n', 'no tag'),
    'no tag anywhere': ('image,tags\na.jpg,\n', 'no tag'),
    'an image that is not there':
        ('image,tags\na.jpg,cat\nnobody.jpg,cat\n', 'line 3', "'nobody.jpg'"),
    'a row without an image': ('image,tags\n,cat\n', 'line 2', "''"),
    'a path that leads out':
        ('image,tags\n../secret.jpg,cat\n', 'line 2', "'../secret.jpg'", 'below'),
    'a path of Windows that leads out':
        ('image,tags\nsub\\..\\..\\secret.jpg,cat\n', 'line 2', 'below'),
    'an absolute path': ('image,tags\n/etc/passwd,cat\n', 'line 2', "'/etc/passwd'", 'below'),
    'a drive': ('image,tags\nC:\\a.jpg,cat\n', 'line 2', 'below'),
    'an unknown mark': ('image,cat,dog\na.jpg,1,2\n', 'line 2', "'2'", "'dog'"),
    'a column without a name': ('image,cat,,dog\na.jpg,1,x,1\n', 'line 2', "'x'"),
    'a mark without a class': ('image,cat,dog\na.jpg,1,0,x\n', 'line 2', "'x'"),
    'not UTF-8': ('image,tags\na.jpg,büffel\n'.encode('latin1'), 'UTF-8'),
    'a cell without end': ('image,tags\n' + 'a'*200_000 + ',cat\n', 'line 2', 'CSV'),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_spreadsheets(pictures, name):
    "Nothing is written."
    photo(pictures.parent/'secret.jpg')
    text, *words = BAD[name]
    fails(lambda: made(pictures, text), 'list.csv', *words)
    assert not (pictures.parent/'out').exists()


def test_the_same_name_in_two_folders(pictures):
    "The spreadsheet then names the path, and the folder becomes a prefix of the id."
    photo(pictures/'sub'/'a.jpg', 9)
    photo(pictures/'sub'/'deep er'/'e.jpeg', 9)
    text = 'image,tags\na.jpg,cat\nsub/a.jpg,dog\nsub/deep er/e,cat\nd,dog\n'
    want = {'a': {'cat'}, 'sub_a': {'dog'}, 'sub_deep er_e': {'cat'}, 'd': {'dog'}}
    assert made(pictures, text)[0] == want
    link = pictures.parent/'out'/'JPEGImages'/'sub_a.jpg'
    assert link.resolve() == pictures/'sub'/'a.jpg'
    ambiguous = 'image,tags\ne.jpeg,cat\n'
    fails(lambda: made(pictures, ambiguous), 'line 2', "'e.jpeg'", '2 photographs')


def test_two_photographs_that_would_have_one_id(pictures):
    photo(pictures/'a.png', 9)
    fails(lambda: made(pictures, SHEETS['spaces']), 'a.jpg', 'a.png', "'a'")
    (pictures/'a.png').rename(pictures/'sub_e.png')
    photo(pictures/'e.jpg', 9)
    fails(lambda: made(pictures, SHEETS['spaces']), 'sub_e')


def test_accents_of_a_mac(pictures):
    photo(pictures/(unicodedata.normalize('NFD', 'büffel') + '.jpg'), 9)
    assert [*made(pictures, 'image,tags\nbüffel.jpg,cat\n')[0].values()] == [{'cat'}]


@pytest.mark.parametrize('name', ['x\ny.jpg', ' x.jpg', 'x.jpg.jpg', 'x\\y.jpg'])
def test_names_that_cannot_be_an_id(pictures, name):
    photo(pictures/name)
    out, i = pictures.parent/'out', name.removesuffix('.jpg')
    fails(lambda: write_folder(out, {i: pictures/name}, {i: []}, ['background', 'cat']),
          repr(i)[1:-1])
    assert not (pictures.parent/'out').exists()


def test_class_folders(tmp_path):
    """One photograph in two folders has both tags; different ones of one name get different ids.

    A space becomes an underscore, the folder `background` gives no tag."""
    names = ['cat/1.jpg', 'cat/2.jpg', 'traffic light/2.jpg', 'traffic light/old/3.jpg',
             'background/4.jpg', 'nowhere.jpg']
    for k, name in enumerate(names):
        photo(tmp_path/'all'/name, 40*k)
    shutil.copy(tmp_path/'all'/'cat'/'1.jpg', tmp_path/'all'/'traffic light'/'1.jpg')
    counts = make_folder(tmp_path/'out', tmp_path/'all')
    assert tags_of(tmp_path/'out') == {
        '1': {'cat', 'traffic_light'},
        'cat_2': {'cat'},
        'traffic light_2': {'traffic_light'},
        '3': {'traffic_light'},
        '4': set(),
    }
    assert counts == {'images': 5, 'without tags': 1, 'masks': 0, 'left out': 1, 'other files': 0}
    assert not folder_report(tmp_path/'out')[1]


def test_folders_that_are_no_classes(tmp_path):
    for part in ('train', 'val'):
        photo(tmp_path/'all'/part/'cat'/f'{part}.jpg')
    fails(lambda: make_folder(tmp_path/'out', tmp_path/'all'), 'all', 'class')
    assert make_folder(tmp_path/'out', tmp_path/'all'/'train')['images'] == 1
    photo(tmp_path/'flat'/'a.jpg')
    fails(lambda: make_folder(tmp_path/'flat-out', tmp_path/'flat'), 'flat', 'class')
    fails(lambda: make_folder(tmp_path/'out', tmp_path/'nowhere'), 'nowhere', 'missing')


def test_masks_for_evaluation(pictures):
    "Images with a mask are for evaluation, the others for training; all masked: one list."
    masks = pictures.parent/'masks'
    write_mask(masks/'b c.png', np.ones((8, 12)))
    write_mask(masks/'nobody.png', np.ones((8, 12)))
    counts = made(pictures, SHEETS['spaces'], masks=masks)[1]
    out = pictures.parent/'out'
    assert counts['masks'] == 1
    assert TagFolder(out, 'val').ids == ['b c'] and TagFolder(out).ids == ['a', 'd', 'e']
    check(TagFolder(out, 'val'), masks=True)
    table, problems = folder_report(out)
    assert not problems and table.loc['masks'].to_dict() == {'train': 0, 'val': 1}
    for i in WANT:
        write_mask(masks/f'{i}.png', np.ones((8, 12)))
    shutil.rmtree(out)
    made(pictures, SHEETS['spaces'], masks=masks)
    assert TagFolder(out).has_masks and not (out/'ImageSets').exists()
    shutil.rmtree(masks)
    write_mask(masks/'a_mask.png', np.ones((8, 12)))
    fails(lambda: made(pictures, SHEETS['spaces'], masks=masks), 'masks', 'a.png')


def test_no_file_of_the_user_is_lost(pictures):
    """Photographs that already lie in the layout stay files, and the list is not overwritten.

    A folder is not made inside its own photographs."""
    out = pictures.parent/'out'
    out.mkdir()
    pictures.rename(out/'JPEGImages')
    (out/'tags.csv').write_text(SHEETS['columns of x'])
    fails(lambda: make_folder(out, out/'JPEGImages', out/'tags.csv'), 'tags.csv', 'another name')
    (out/'tags.csv').rename(out/'list.csv')
    (out/'JPEGImages'/'sub'/'e.jpeg').rename(out/'JPEGImages'/'e.jpeg')
    (out/'JPEGImages'/'b c.JPG').rename(out/'JPEGImages'/'b c.jpg')
    make_folder(out, out/'JPEGImages', out/'list.csv')
    assert tags_of(out) == WANT and not any(p.is_symlink() for p in out.rglob('*'))
    for inside in (out, out/'new', out/'..'/'out'/'new'):
        fails(lambda inside=inside: make_folder(inside, out, out/'list.csv'), 'lies in')
    photo(pictures/'a.jpg', 99)
    (out/'list.csv').write_text('image,tags\na,cat\n')
    fails(lambda: make_folder(out, pictures, out/'list.csv'),
          'JPEGImages/a.jpg', 'there already')


def test_images_that_are_a_link_to_a_folder(pictures):
    "A linked folder belongs to the user: no link in it is deleted."
    out = pictures.parent/'out'
    out.mkdir()
    (out/'JPEGImages').symlink_to(pictures)
    (pictures/'z.jpg').symlink_to(pictures/'a.jpg')
    (pictures/'list.csv').write_text('image,tags\na,cat\nz,dog\nd,cat\n')
    make_folder(out, pictures, pictures/'list.csv')
    (pictures/'list.csv').write_text('image,tags\na,cat\nd,dog\n')
    make_folder(out, pictures, pictures/'list.csv')
    assert (pictures/'z.jpg').is_symlink()


def nfd(text): return unicodedata.normalize('NFD', text)


MISREAD = {  # cells that could be learned wrongly, and words of the one sentence about them
    'a bar': ('a.jpg,dog|cat\n', "'dog|cat'", 'spaces, commas or semicolons'),
    'a list of Python': ('a.jpg,"[\'dog\', \'cat\']"\n', "[\'dog\'", 'commas'),
    'a list of JSON': ('a.jpg,"[""dog"", ""cat""]"\n', '["dog"', 'commas'),
    'an ampersand': ('a.jpg,dog & cat\n', "'dog & cat'", "'&'"),
    'a plus': ('a.jpg,dog+cat\n', "'dog+cat'"),
    'a slash': ('a.jpg,dog/cat\n', "'dog/cat'"),
    'the word and': ('a.jpg,dog and cat\n', "'dog and cat'", "'and'"),
    'hashtags': ('a.jpg,#dog #cat\n', "'#dog #cat'"),
    'scores': ('a.jpg,dog:0.9 cat:0.1\n', "'dog:0.9 cat:0.1'"),
    'a remark': ('a.jpg,dog (small)\n', "'dog (small)'"),
    'a name of two words': ('a.jpg,"traffic light, dog"\n', "'traffic light'", "'traffic_light'"),
    'a name of two words, without quotes':
        ('a.jpg,traffic light,dog\n', "'traffic light'", "'traffic_light'"),
    'a name of two words, commas elsewhere':
        ('a.jpg,dog\nb c.JPG,traffic light\nd.png,"dog, cat"\n', "'traffic light'", 'line 3'),
    'nan': ('a.jpg,nan\n', "'nan'", 'empty'),
    'None': ('a.jpg,dog\nb c.JPG,None\n', "'None'", 'empty', 'line 3'),
    'N/A': ('a.jpg,N/A\n', "'N/A'", 'empty'),
    'a dash': ('a.jpg,-\n', "'-'", 'empty'),
    'a question mark': ('a.jpg,dog ?\n', "'?'", 'empty'),
    'capitals': ('a.jpg,dog\nb c.JPG,Dog\n', "'Dog' and 'dog'"),
    'a header with masks in mind': ('', 'no tag', 'line 1'),
}


@pytest.mark.parametrize('name', MISREAD)
def test_cells_that_can_be_read_in_two_ways(pictures, name):
    "Refused with the line and what to write; nothing is written, also where masks are given."
    text, *words = MISREAD[name]
    write_mask(pictures.parent/'masks'/'a.png', np.ones((8, 12)))
    for options in ({}, dict(masks=pictures.parent/'masks')):
        fails(lambda options=options: made(pictures, 'image,tags\n' + text, **options),
              'list.csv', *words)
    assert not (pictures.parent/'out').exists()


@pytest.mark.parametrize('text, classes, want', [
    ('a.jpg,"traffic light, dog"\n', 'traffic light,dog', {'traffic_light', 'dog'}),
    ('a.jpg,traffic light\n', ['traffic_light'], {'traffic_light'}),
    ('a.jpg,dog and cat\n', ['dog', 'and', 'cat'], {'dog', 'and', 'cat'}),
    ('a.jpg,rock&roll none\n', ['rock&roll', 'none'], {'rock&roll', 'none'}),
    ('a.jpg,Dog dog\n', ['Dog', 'dog'], {'Dog', 'dog'}),
    ('a.jpg,"cat dog, bird"\nb c.JPG,cat\nd.png,dog\n', None, {'cat', 'dog', 'bird'}),
    (nfd('a.jpg,büffel\nb c.JPG,')+'büffel\n', None, {'büffel'}),
    (nfd('a.jpg,büffel\n'), 'büffel', {'büffel'}),
    ('a.jpg,कुत्ता 猫 e-bike x.y\n', None, {'कुत्ता', '猫', 'e-bike', 'x.y'}),
])
def test_classes_decide_how_a_cell_is_read(pictures, text, classes, want):
    assert made(pictures, 'image,tags\n' + text, classes=classes)[0]['a'] == want


@pytest.mark.parametrize('classes', ['cat, dog', ' cat ;dog', ['cat', ' dog'], ['cat ', 'dog']])
def test_spaces_around_given_classes(pictures, classes):
    made(pictures, SHEETS['commas in quotes'], classes=classes)
    assert TagFolder(pictures.parent/'out').classes == ['background', 'cat', 'dog']
    assert class_counts(pictures.parent/'out') == {'cat': 2, 'dog': 2}


@pytest.mark.parametrize('classes', ['cat,,dog', 'cat,dog,', 'cat,cat,dog'])
def test_given_classes_without_a_name_or_twice(pictures, classes):
    fails(lambda: made(pictures, SHEETS['spaces'], classes=classes), 'classes.txt')


def test_a_class_folder_of_another_format(tmp_path):
    "HEIC, as telephones write it, or WebP: the format is named, for one class or for all."
    for name in ('cat/1.HEIC', 'cat/2.heic', 'dog/1.webp', 'dog/notes.txt'):
        (tmp_path/'all'/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/'all'/name).write_bytes(b'')
    def make(): return make_folder(tmp_path/'out', tmp_path/'all')
    fails(make, 'all has no photograph', '2 .heic, 1 .webp', '.jpg or .png')
    photo(tmp_path/'all'/'dog'/'2.jpg')
    fails(make, 'cat has no photograph', '2 .heic')
    photo(tmp_path/'all'/'cat'/'3.jpg')
    assert make() == {
        'images': 2, 'without tags': 0, 'masks': 0, 'left out': 0, 'other files': 4}
    (tmp_path/'empty').mkdir()
    fails(lambda: make_folder(tmp_path/'out', tmp_path/'empty'), 'empty has no photograph')
    (tmp_path/'list.csv').write_text('image,tags\n1,cat\n')
    (tmp_path/'empty'/'1.tif').write_bytes(b'')
    fails(lambda: make_folder(tmp_path/'out', tmp_path/'empty', tmp_path/'list.csv'), '1 .tif')


def test_masks_of_a_mac(pictures):
    photo(pictures/(nfd('büffel') + '.jpg'), 9)
    write_mask(pictures.parent/'masks'/(nfd('büffel') + '.png'), np.ones((8, 12)))
    sheet = 'image,tags\nbüffel,cat\na,cat\n'
    counts = made(pictures, sheet, masks=pictures.parent/'masks')[1]
    val = TagFolder(pictures.parent/'out', 'val')
    assert counts['masks'] == 1 and val.ids == ['büffel'] and val.has_masks
    check(val, masks=True)
    assert not folder_report(pictures.parent/'out')[1]


def test_names_of_240_bytes(pictures):
    "Photograph, mask and link; longer ones are refused before anything is written."
    photo(pictures/f'{"猫"*82}.jpg')
    write_mask(pictures.parent/'masks'/f'{"猫"*82}.png', np.ones((8, 12)))
    sheet = f'image,tags\n{"猫"*82}.jpg,cat\na,cat\n'
    made(pictures, sheet, masks=pictures.parent/'masks')
    check(TagFolder(pictures.parent/'out', 'val'), masks=True)
    deep = pictures/('x'*100)/('y'*100)
    for k in range(2):
        photo(deep/str(k)/f'{"z"*100}.jpg', 9*k)
    sheet = f'image,tags\n{"x"*100}/{"y"*100}/0/{"z"*100},cat\n'
    shutil.rmtree(pictures.parent/'out')
    fails(lambda: made(pictures, sheet), 'cannot be the name')
    assert not (pictures.parent/'out').exists()


# Called again.

def test_again_without_masks(pictures):
    "Links to masks and lists go; a photograph that is new is learned from."
    write_mask(pictures.parent/'masks'/'a.png', np.ones((8, 12)))
    out = pictures.parent/'out'
    made(pictures, 'image,tags\na,cat\nd,dog\n', masks=pictures.parent/'masks')
    assert TagFolder(out).ids == ['d']
    counts = made(pictures, 'image,tags\na,cat\nd,dog\ne,dog\n')[1]
    assert counts['masks'] == 0 and TagFolder(out).ids == ['a', 'd', 'e']
    assert not (out/'ImageSets').exists() and not [*(out/'SegmentationClass').iterdir()]
    assert not folder_report(out)[1]


def test_again_with_other_masks(pictures):
    "The mask of another photograph, then the same from another folder: links and lists follow."
    out, sheet = pictures.parent/'out', 'image,tags\na,cat\nd,dog\ne,dog\n'
    for name, masked, rest in (('one', 'a', ['d', 'e']), ('two', 'd', ['a', 'e']),
                               ('three', 'd', ['a', 'e'])):
        write_mask(pictures.parent/name/f'{masked}.png', np.ones((8, 12)))
        made(pictures, sheet, masks=pictures.parent/name)
        assert TagFolder(out).ids == rest and TagFolder(out, 'val').ids == [masked]
        links = [*(out/'SegmentationClass').iterdir()]
        assert [p.resolve() for p in links] == [pictures.parent/name/f'{masked}.png']
        assert not folder_report(out)[1]


def test_again_with_photographs_from_another_folder(pictures):
    out, sheet = pictures.parent/'out', 'image,tags\na,cat\n'
    made(pictures, sheet)
    moved = pictures.rename(pictures.with_name('moved'))
    photo(moved/'a.jpg', 200)
    made(moved, sheet)
    assert (out/'JPEGImages'/'a.jpg').resolve() == moved/'a.jpg'


def test_masks_put_there_by_hand_stay(pictures):
    "They are files, not links; lists follow them, too."
    out, sheet = pictures.parent/'out', 'image,tags\na,cat\nd,dog\n'
    made(pictures, sheet)
    write_mask(out/'SegmentationClass'/'a.png', np.ones((8, 12)))
    counts = made(pictures, sheet + 'e,dog\n')[1]
    assert counts['masks'] == 1 and TagFolder(out, 'val').ids == ['a']
    assert TagFolder(out).ids == ['d', 'e'] and TagFolder(out, 'val').has_masks


@pytest.mark.parametrize('lists', [
    dict(train='a\n', val='d\n'), dict(val='d\ne\n'), dict(train='d\ne\n', val='a\ne\n'),
    dict(train='d\n')])
def test_lists_written_by_hand_are_not_lost(pictures, lists):
    out, sheet = pictures.parent/'out', 'image,tags\na,cat\nd,dog\ne,dog\n'
    write_mask(pictures.parent/'masks'/'a.png', np.ones((8, 12)))
    made(pictures, sheet, masks=pictures.parent/'masks')
    for name, text in lists.items():
        (out/'ImageSets'/f'{name}.txt').write_text(text)
    before = tree(out/'ImageSets')
    for options in ({}, dict(masks=pictures.parent/'masks')):
        fails(lambda options=options: made(pictures, sheet, **options), 'by hand', 'ImageSets')
        assert tree(out/'ImageSets') == before


@pytest.mark.parametrize('steps', range(9))
def test_after_a_kill_the_folder_is_made_again(pictures, monkeypatch, steps):
    "Wherever the second call ends, a third makes what the second would have made."
    out, masks, sheet = pictures.parent/'out', pictures.parent/'masks', 'image,tags\na,cat\nd,dog\n'
    write_mask(masks/'a.png', np.ones((8, 12)))
    made(pictures, sheet, masks=masks)
    write_mask(masks/'d.png', np.ones((8, 12)))
    replace, calls = os.replace, []
    def cut(source, target):
        calls.append(target)
        if len(calls) > steps:
            raise KeyboardInterrupt
        replace(source, target)
    with monkeypatch.context() as patch:
        patch.setattr(os, 'replace', cut)
        try:
            made(pictures, sheet + 'e,dog\n', masks=masks)
        except KeyboardInterrupt:
            assert steps < 8
    made(pictures, sheet + 'e,dog\n', masks=masks)
    assert TagFolder(out).ids == ['e'] and TagFolder(out, 'val').ids == ['a', 'd']
    assert not folder_report(out)[1]


def test_other_lists_stay(pictures):
    out = pictures.parent/'out'
    made(pictures, 'image,tags\na,cat\nd,dog\n')
    (out/'ImageSets').mkdir()
    (out/'ImageSets'/'small.txt').write_text('a\n')
    made(pictures, 'image,tags\na,cat\nd,dog\ne,cat\n')
    assert TagFolder(out).ids == ['a', 'd', 'e'] and TagFolder(out, 'small').ids == ['a']


# Masks of 0 and 255, and missing ones.

@pytest.mark.parametrize('given', ['255=1', {255: 1}, '255=1,7=2', '255 = 1'])
def test_mask_values(pictures, given):
    "The masks in the dataset are converted files; the originals stay, and again changes nothing."
    masks, out = pictures.parent/'masks', pictures.parent/'out'
    for i in WANT:
        write_mask(masks/f'{i}.png', np.full((8, 12), [[0, 255, 7]*4]))
    before = [p.read_bytes() for p in sorted(masks.iterdir())]
    options = dict(masks=masks, classes='cat,dog')
    made(pictures, SHEETS['spaces'], **options)
    assert any('value 7' in p for p in folder_report(out)[1])
    for _ in range(2):
        made(pictures, SHEETS['spaces'], mask_values=given, **options)
        assert [p.read_bytes() for p in sorted(masks.iterdir())] == before
        other = 2 if '7' in str(given) else 7
        assert TagFolder(out).mask(0)[0, :3].tolist() == [0, 1, other]
    write_mask(masks/'a.png', np.full((8, 12), 255))
    fails(lambda: made(pictures, SHEETS['spaces'], mask_values=given, **options),
          'a.png', 'there already')


@pytest.mark.parametrize('given, words', [
    ('255', 'VALUE=CLASS'), ('255=1=2', 'VALUE=CLASS'), ('255=dog', 'VALUE=CLASS'),
    ('', 'VALUE=CLASS'), ('255=3', '255=3'), ({256: 1}, '256=1'), ({255: -1}, '255=-1')])
def test_mask_values_that_are_none(pictures, given, words):
    write_mask(pictures.parent/'masks'/'a.png', np.full((8, 12), 255))
    fails(lambda: made(pictures, SHEETS['spaces'], masks=pictures.parent/'masks',
                       mask_values=given), words)
    assert not (pictures.parent/'out').exists()


def test_mask_values_need_masks_from_elsewhere(pictures):
    out = pictures.parent/'out'
    fails(lambda: made(pictures, SHEETS['spaces'], mask_values='255=1'), 'folder of the masks')
    write_mask(out/'SegmentationClass'/'a.png', np.full((8, 12), 255))
    fails(lambda: made(pictures, SHEETS['spaces'], masks=out/'SegmentationClass',
                       mask_values='255=1'), 'would be overwritten')
    assert read_mask(out/'SegmentationClass'/'a.png').min() == 255


def test_a_report_on_masks_of_0_and_255(pictures):
    for i in WANT:
        write_mask(pictures.parent/'masks'/f'{i}.png', np.full((8, 12), [[0, 255, 0]*4]))
    made(pictures, SHEETS['spaces'], masks=pictures.parent/'masks')
    problems = folder_report(pictures.parent/'out')[1]
    assert len(problems) == 1
    for words in ('a.png has only 0 and 255', '3 of the 3', 'should be 1', '--mask-values 255=1'):
        assert words in problems[0]


def test_missing_masks_are_counted(mine):
    assert mask_remarks(mine) == []
    (mine/'SegmentationClass'/'val00002.png').unlink()
    for i in range(5):
        (mine/'SegmentationClass'/f'train0000{i}.png').unlink()
    train, val = mask_remarks(mine)
    assert train.startswith("5 of 16 photographs in the list 'train' lack") and '00000.png' in train
    assert val.startswith("1 of 4 photographs in the list 'val' lack") and 'val00002.png' in val
    shutil.rmtree(mine/'SegmentationClass')
    assert mask_remarks(mine) == []


# Disks without links, and disks that are full.

@pytest.mark.parametrize('number', [errno.EPERM, errno.ENOTSUP, errno.ENOSYS])
def test_where_links_are_refused_files_are_copied(pictures, monkeypatch, number):
    def refuse(source, target): raise OSError(number, os.strerror(number), str(target))
    monkeypatch.setattr(os, 'symlink', refuse)
    write_mask(pictures.parent/'masks'/'a.png', np.ones((8, 12)))
    out = pictures.parent/'out'
    for _ in range(2):
        got, counts = made(pictures, SHEETS['spaces'], masks=pictures.parent/'masks')
        assert TagFolder(out).ids == ['b c', 'd', 'e'] and TagFolder(out, 'val').has_masks
        assert not any(p.is_symlink() for p in out.rglob('*')) and counts['masks'] == 1
    assert (out/'JPEGImages'/'a.jpg').read_bytes() == (pictures/'a.jpg').read_bytes()
    photo(pictures/'a.jpg', 99)
    fails(lambda: made(pictures, SHEETS['spaces'], masks=pictures.parent/'masks'),
          'a.jpg', 'there already')


def test_a_copy_is_not_written_through_a_link(pictures, monkeypatch, tmp_path):
    "What an interrupted call left under the temporary name leads to a file of the user."
    target = tmp_path/'out'/'a.jpg'
    part = target.with_name(f'.a.{os.getpid()}.part.jpg')
    part.parent.mkdir()
    part.symlink_to(pictures/'d.png')
    before = (pictures/'d.png').read_bytes()
    def refuse(source, target): raise OSError(errno.EPERM, 'no', str(target))
    monkeypatch.setattr(os, 'symlink', refuse)
    link_file(pictures/'a.jpg', target)
    assert (pictures/'d.png').read_bytes() == before and not target.is_symlink()


def test_a_folder_that_is_not_writable(pictures, monkeypatch):
    def refuse(*path): raise OSError(errno.EROFS, 'Read-only file system', str(path[-1]))
    monkeypatch.setattr(os, 'symlink', refuse)
    monkeypatch.setattr(shutil, 'copyfile', refuse)
    fails(lambda: made(pictures, SHEETS['spaces']), 'a.jpg cannot be written', 'Read-only')


def is_name(text): return text == text.strip() and text[0] != '.' and text != '..'


NAMES = st.text('abc é.-,;"\'', min_size=1, max_size=5).filter(is_name)
TAGS = st.sets(st.sampled_from(['cat', 'dog', 'Übermut']))
TAGGED = st.dictionaries(NAMES, TAGS, min_size=1, max_size=5)


@settings(max_examples=40)
@given(TAGGED.filter(lambda want: any(want.values())), st.sampled_from(',;'))
def test_any_names_and_tags(tmp_path_factory, want, delimiter):
    "Spreadsheets that pandas writes, in both forms and with either separator, are read unchanged."
    box = tmp_path_factory.mktemp('any')
    for k, name in enumerate(want):
        photo(box/'p'/f'{name}.jpg', k)
    words = sorted(set().union(*want.values()))
    narrow = {'image': [f'{i}.jpg' for i in want], 'tags': [' '.join(w) for w in want.values()]}
    wide = {'image': [*want], **{c: [c in w for w in want.values()] for c in words}}
    options = dict(sep=delimiter, index=False)
    pd.DataFrame(narrow).to_csv(box/'narrow.csv', encoding='utf-8-sig', **options)
    pd.DataFrame(wide).to_csv(box/'wide.csv', lineterminator='\r\n', **options)
    for sheet in ('narrow', 'wide'):
        make_folder(box/sheet, box/'p', box/f'{sheet}.csv')
        assert tags_of(box/sheet) == want


# The report.

def test_report_of_a_good_folder(mine):
    "The counts equal those by hand."
    table, problems = folder_report(mine)
    assert not problems and [*table.columns] == ['train', 'val']
    for split in table:
        folder = TagFolder(mine, split)
        n = len(folder)
        assert table[split].tolist() == [n, n, n, *folder.tags.sum(0).int().tolist()]
    assert [*table.index] == ['images', 'masks', 'saliency', *folder.classes[1:]]


def edit(file, old, new):
    "Damage: replace a text in a file."
    def damage(root): (root/file).write_text((root/file).read_text().replace(old, new))
    return damage


def write(file, content):
    "Damage: write a text or bytes to a file."
    data = content.encode() if isinstance(content, str) else content
    def damage(root): (root/file).write_bytes(data)
    return damage


def delete(*names):
    "Damage: delete files or folders."
    def damage(root):
        for name in names:
            if (root/name).is_dir():
                shutil.rmtree(root/name)
            else:
                (root/name).unlink()
    return damage


def mask(name, values):
    "Damage: write a mask."
    def damage(root): write_mask(root/'SegmentationClass'/name, values)
    return damage


def empty_lists(root):
    for p in (root/'ImageSets').iterdir():
        p.unlink()


def folder_among_images(root): (root/'JPEGImages'/'a.jpg').mkdir()


def colour_mask(root):
    Image.new('RGB', (128, 128)).save(root/'SegmentationClass'/'train00001.png')


def broken_link(root):
    path = root/'SegmentationClass'/'train00001.png'
    path.unlink()
    path.symlink_to('nowhere')


DAMAGE = {  # kind of damage -> function that does it; file and words of the one sentence about it
    'no classes':
        (delete('classes.txt'), 'classes.txt', 'missing'),
    'a class twice':
        (edit('classes.txt', 'cat\n', 'cat\ncat\n'), 'classes.txt', "'cat' more than once"),
    'no tags':
        (delete('tags.csv'), 'tags.csv', 'missing'),
    'no rows':
        (write('tags.csv', 'image,tags\n'), 'tags.csv', 'no row'),
    'a bad row':
        (edit('tags.csv', 'image,tags\n', 'image,tags\na,b,c\n'), 'tags.csv line', '3 columns'),
    'an unknown tag':
        (edit('tags.csv', 'train00003,', 'train00003,unicorn '), 'tags.csv line', 'unicorn'),
    'a row twice':
        (edit('tags.csv', 'train00003,', 'train00003,cat\ntrain00003,'),
         'tags.csv line', "repeats image 'train00003'"),
    'a row without image':
        (edit('tags.csv', 'image,tags\n', 'image,tags\nnobody,cat\n'), 'tags.csv', "'nobody'"),
    'an id without file':
        (edit('ImageSets/val.txt', 'val00000', 'val00000\nnobody'), 'nobody.jpg', "'val'"),
    'an id that leads out':
        (edit('ImageSets/val.txt', 'val00000', 'val00000\n../val00001'),
         'val.txt line', "'../val00001'"),
    'an id twice':
        (edit('ImageSets/val.txt', 'val00002', 'val00002\nval00002'),
         'val.txt', "'val00002' 2 times"),
    'an empty list':
        (write('ImageSets/test.txt', ''), "'test'", 'empty'),
    'no list':
        (empty_lists, 'ImageSets', 'no list'),
    'lists that overlap':
        (edit('ImageSets/val.txt', 'val00003', 'val00003\ntrain00002\ntrain00004'),
         'train.txt and val.txt share 2', "'train00002'"),
    'an image in no list':
        (edit('ImageSets/val.txt', 'val00001\n', ''), 'val00001.jpg', 'no list'),
    'an image that is cut off':
        (write('JPEGImages/train00001.jpg', b'\xff\xd8\xff'),
         'train00001.jpg', 'cannot be read as an image'),
    'another kind of file':
        (write('JPEGImages/a.tif', ''), 'a.tif', 'not read'),
    'a folder among the images':
        (folder_among_images, 'a.jpg', 'folder'),
    'a mask of another size':
        (mask('train00001.png', np.zeros((3, 4))), 'train00001.png', '4x3', '128x128'),
    'a mask of other classes':
        (mask('train00001.png', np.full((128, 128), 7)), 'train00001.png', 'value 7'),
    'a mask in colour':
        (colour_mask, 'train00001.png', 'palette'),
    'a mask without image':
        (mask('nobody.png', np.zeros((3, 4))), 'nobody.png', 'belongs to no image'),
    'a mask that is a broken link':
        (broken_link, 'train00001.png', 'cannot be read'),
    'saliency that is no image':
        (write('Saliency/train00001.png', ''), 'Saliency', 'train00001.png', 'cannot be read'),
    'a class without image':
        (edit('classes.txt', 'cat\n', 'cat\ngriffin\n'), 'classes.txt', "'griffin'", 'no image'),
    'no images':
        (delete('JPEGImages', 'tags.csv', 'ImageSets'), 'JPEGImages is missing'),
}


@pytest.mark.parametrize('name', DAMAGE)
def test_report_names_each_problem_once(mine, name):
    damage, *words = DAMAGE[name]
    damage(mine)
    problems = folder_report(mine)[1]
    about = [p for p in problems if all(w in p for w in words)]
    # without images there are no tags either, and the one list is empty
    assert len(about) == 1 and len(problems) == (3 if name == 'no images' else 1), problems
    assert str(mine) in about[0]


ALONE = {  # damage that hides other damage
    'no classes', 'no tags', 'no rows', 'no list', 'no images', 'a mask of other classes',
    'a mask in colour', 'a mask that is a broken link', 'a mask of another size',
    'an image in no list', 'a class twice', 'a row twice',
}


def test_report_names_all_problems_at_once(mine):
    "Damage that does not touch the same files adds up."
    together = [name for name in DAMAGE if name not in ALONE]
    for name in together:
        DAMAGE[name][0](mine)
    problems = folder_report(mine)[1]
    for name in together:
        about = [p for p in problems if all(w in p for w in DAMAGE[name][1:])]
        assert len(about) == 1, (name, problems)
    assert len(problems) == len(together) == len(set(problems))


def test_lists_that_may_overlap(mine):
    "Training lists among themselves; a list of another name with any; trainval with both."
    lists = mine/'ImageSets'
    train, val = (lists/'train.txt').read_text(), (lists/'val.txt').read_text()
    (lists/'train_aug.txt').write_text(train)
    (lists/'trainval.txt').write_text(train + val)
    (lists/'mine.txt').write_text(val)
    (lists/'val_small.txt').write_text(val[:9])
    assert not folder_report(mine)[1]
    (lists/'test.txt').write_text(val)
    problems = [p.split('ImageSets/')[1][:17] for p in folder_report(mine)[1]]
    assert problems == ['test.txt and val.', 'test.txt and val_']


def test_report_of_any_folder(tmp_path):
    "An empty folder, and one that does not exist."
    for root in (tmp_path, tmp_path/'nowhere'):
        table, problems = folder_report(root)
        for name in ('classes.txt', 'JPEGImages', 'tags.csv'):
            assert any(f'{name} is missing' in p for p in problems)
        assert table['train'].tolist() == [0, 0, 0]


def test_photographs_of_voc():
    "A prepared folder of real photographs, where it is available."
    root = pathlib.Path(__file__).parents[2]/'shared'/'data'/'voc-animals'
    if not root.is_dir():
        pytest.skip('no voc-animals here')
    table, problems = folder_report(root)
    assert not problems and table['train']['images'] == 2450
    assert table['val'][['images', 'masks', 'dog', 'cat']].tolist() == [222, 222, 64, 60]
