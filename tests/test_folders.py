"Folders as people have them, archives and spreadsheets as strangers send them."
import io
import random
import shutil
import stat
import tarfile
import types
import zipfile
import pytest
from ppc.data import DataError
from ppc.folders import unpack


def fails(what, *words):
    "The call raises a `DataError` that says all the words."
    with pytest.raises(DataError) as e: what()
    for w in words: assert w in str(e.value), str(e.value)


def tree(folder): return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob('*')) if p.is_file() and not p.name.endswith('.unpacked')}


def member(name, kind=tarfile.REGTYPE, to='', text='hello'):
    "A member of a tar archive and its bytes."
    m = tarfile.TarInfo(name)
    m.type, m.linkname, m.size = kind, to, len(text) if kind == tarfile.REGTYPE else 0
    return m, io.BytesIO(text.encode())


def tar(path, *members, mode='w'):
    with tarfile.open(path, mode) as t:
        for m, data in members: t.addfile(m, data if m.size else None)
    return path


def zipped(path, *members):
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z:
        for name, text in members: z.writestr(name, text)
    return path


@pytest.mark.parametrize('name, mode', [('a.tar', 'w'), ('a.tar.gz', 'w:gz'), ('a.tgz', 'w:gz'), ('a.tar.bz2', 'w:bz2'), ('a.tar.xz', 'w:xz')])
def test_unpack_tar(tmp_path, name, mode):
    archive = tar(tmp_path/name, member('./d', tarfile.DIRTYPE), member('./d/a.txt', text='one'), member('b c.txt', text='two'), member('empty', text=''), mode=mode)
    assert unpack(archive, tmp_path/'out') == tmp_path/'out'
    assert tree(tmp_path/'out') == {'d/a.txt': 'one', 'b c.txt': 'two', 'empty': ''}


def test_unpack_zip(tmp_path):
    archive = zipped(tmp_path/'a.ZIP', ('d/', ''), ('d/a.txt', 'one'), ('from\\windows.txt', 'two'))
    unpack(archive, tmp_path/'out')
    assert tree(tmp_path/'out') == {'d/a.txt': 'one', 'from/windows.txt': 'two'}


OUT = ['../evil', 'a/../../evil', 'a/../b', '/evil', '//evil', 'C:/evil', 'c:evil', '..\\evil', '\\evil', '\\\\server\\evil', 'a\nb']


@pytest.mark.parametrize('name', OUT)
def test_members_that_lead_out(tmp_path, name):
    "Nothing at all is written, not even the good member before."
    box = tmp_path/'box'
    for archive in (zipped(tmp_path/'a.zip', ('good', 'good'), (name, 'evil')), tar(tmp_path/'a.tgz', member('good'), member(name), mode='w:gz')):
        fails(lambda: unpack(archive, box/'out'), str(archive), repr(name))
        assert not box.exists() and not any(p.name == 'evil' for p in tmp_path.rglob('*'))


@pytest.mark.parametrize('kind, to', [
    (tarfile.SYMTYPE, '../secret'), (tarfile.SYMTYPE, '/etc/passwd'), (tarfile.SYMTYPE, '.'), (tarfile.SYMTYPE, 'bad'), (tarfile.SYMTYPE, 'nothing'),
    (tarfile.LNKTYPE, '../secret'), (tarfile.LNKTYPE, '/etc/passwd'), (tarfile.LNKTYPE, 'bad'), (tarfile.CHRTYPE, ''), (tarfile.BLKTYPE, ''), (tarfile.FIFOTYPE, '')])
def test_links_and_devices(tmp_path, kind, to):
    (tmp_path/'secret').write_text('secret')
    archive = tar(tmp_path/'a.tar', member('good'), member('bad', kind, to))
    fails(lambda: unpack(archive, tmp_path/'out'), str(archive), "'bad'")
    assert not (tmp_path/'out').exists()


def test_a_folder_made_by_a_link(tmp_path):
    "The old trick: a link to outside, then a file through it."
    archive = tar(tmp_path/'a.tar', member('d', tarfile.SYMTYPE, '..'), member('d/evil'))
    fails(lambda: unpack(archive, tmp_path/'out'), "'d'")
    assert not (tmp_path/'evil').exists()


def test_links_inside_become_copies(tmp_path):
    archive = tar(tmp_path/'a.tar', member('d/a', text='one'), member('e/s', tarfile.SYMTYPE, '../d/a'), member('h', tarfile.LNKTYPE, 'd/a'))
    unpack(archive, tmp_path/'out')
    assert tree(tmp_path/'out') == {'d/a': 'one', 'e/s': 'one', 'h': 'one'} and not any(p.is_symlink() for p in (tmp_path/'out').rglob('*'))


def test_link_in_a_zip(tmp_path):
    link = zipfile.ZipInfo('link')
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    archive = zipped(tmp_path/'a.zip', ('good', 'good'), (link, '/etc/passwd'))
    fails(lambda: unpack(archive, tmp_path/'out'), str(archive), "'link'")
    assert not (tmp_path/'out').exists()


@pytest.mark.parametrize('name', ['a.zip', 'a.tar', 'a.tar.gz'])
def test_damaged_archives(tmp_path, name):
    "Cut off, empty, or text: refused; whole again, it is unpacked over the remains."
    archive, out, text = tmp_path/name, tmp_path/'out', random.Random(0).randbytes(3000).hex()
    if name == 'a.zip': zipped(archive, ('a', text), ('b', text))
    else: tar(archive, member('a', text=text), member('b', text=text), mode='w:gz' if name.endswith('gz') else 'w')
    whole = archive.read_bytes()
    for part in (whole[:len(whole)//2], b'', b'<html>not found</html>'):
        archive.write_bytes(part)
        fails(lambda: unpack(archive, out), str(archive), 'cannot be unpacked')
    archive.write_bytes(whole)
    unpack(archive, out)
    assert tree(out) == {'a': text, 'b': text}
    fails(lambda: unpack(tmp_path/'none.zip', out), 'none.zip', 'missing')


def test_wrong_checksum_in_a_zip(tmp_path):
    "A byte that changed on the way: what came before may stay, but it does not count as unpacked."
    archive = tmp_path/'a.zip'
    with zipfile.ZipFile(archive, 'w') as z: z.writestr('a', 'one'); z.writestr('b', 'two')
    good = archive.read_bytes()
    archive.write_bytes(good.replace(b'two', b'tww'))
    fails(lambda: unpack(archive, tmp_path/'out'), str(archive))
    assert not (tmp_path/'out'/'b').exists() and not list((tmp_path/'out').glob('.*'))
    archive.write_bytes(good)
    unpack(archive, tmp_path/'out')
    assert tree(tmp_path/'out') == {'a': 'one', 'b': 'two'}


def test_unpacked_once(tmp_path):
    "A second call writes nothing, an archive that changed is unpacked again, and two archives share a folder."
    archive, out = zipped(tmp_path/'a.zip', ('a', 'one')), tmp_path/'out'
    unpack(archive, out)
    (out/'a').write_text('mine')
    unpack(archive, out)
    unpack(tar(tmp_path/'b.tar', member('b', text='two')), out)
    assert tree(out) == {'a': 'mine', 'b': 'two'}
    unpack(zipped(archive, ('a', 'three')), out)
    assert tree(out) == {'a': 'three', 'b': 'two'}


def test_links_in_the_target_are_not_written_through(tmp_path):
    "The user's originals stay what they are."
    (tmp_path/'original').write_text('mine')
    (tmp_path/'out').mkdir()
    (tmp_path/'out'/'a').symlink_to(tmp_path/'original')
    unpack(zipped(tmp_path/'a.zip', ('a', 'one')), tmp_path/'out')
    assert (tmp_path/'original').read_text() == 'mine' and tree(tmp_path/'out') == {'a': 'one'}


def test_an_archive_larger_than_the_disk(tmp_path, monkeypatch):
    "What it will need is known before a byte is written."
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: types.SimpleNamespace(free=1000))
    fails(lambda: unpack(tar(tmp_path/'a.tar', member('a'), member('b', text='x'*1000)), tmp_path/'out'), 'a.tar', 'needs')
    assert not list((tmp_path/'out').iterdir())
