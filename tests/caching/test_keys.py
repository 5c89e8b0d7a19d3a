"""Names of cached blocks, and the secret that they are made with."""

import stat
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmjax.errors import UserError
from cmjax.schedule import BlockChain
from cmjax.serve.caching.keys import KEY_BYTES, CacheKeys, read_or_make_key

SECRET = bytes(range(KEY_BYTES))
TOKENS = np.arange(8, dtype=np.int32)
TEXTS = st.text(st.characters(categories=("L", "N", "Cs", "Cc")), max_size=6)


def keys(secret=SECRET, block_tokens=4, **fields):
    return CacheKeys(secret, block_tokens, {"weights": "w", "mtp": "True", **fields})


def names_of(made, namespace="", cache_salt=""):
    chain = BlockChain(made, made.root(namespace, cache_salt), namespace)
    chain.extend(range(8))
    return chain.names


def test_nothing_has_the_same_name_in_two_namespaces():
    made = keys()
    names = [name for namespace in ("", "a", "b") for name in names_of(made, namespace)]
    assert len(set(names)) == 6
    assert {len(name) for name in names} == {32}


def test_whatever_differs_shares_no_name():
    others = [
        keys(bytes(KEY_BYTES)),
        keys(block_tokens=8),
        keys(weights="v"),
        keys(mtp="False"),
        keys(other=""),
    ]
    names = [set(names_of(one)) for one in (keys(), *others)] + [set(names_of(keys(), "", "salt"))]
    assert len(set.union(*names)) == sum(map(len, names))
    assert names_of(keys()) == names_of(keys())


@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=2, max_size=2, unique=True))
def test_no_two_pairs_of_namespace_and_salt_have_one_root(pairs):
    """Wherever one ends and the other begins; lone surrogates and zeros included."""
    made = keys()
    assert made.root(*pairs[0]) != made.root(*pairs[1])


def test_a_block_is_named_by_its_tokens_and_by_all_before_it():
    made = keys()
    first = made.name(made.root("", ""), TOKENS[:4])
    assert made.name(first, TOKENS[4:]) != made.name(made.root("", ""), TOKENS[4:])
    assert made.name(first, TOKENS[4:]) != made.name(first, TOKENS[4:] + 1)
    assert made.name(first, TOKENS[4:]) == made.name(first, TOKENS[4:].astype(">i4").astype(np.int32))


def test_a_key_is_made_once_whoever_asks_and_for_its_owner_alone(tmp_path):
    file = tmp_path / "pool" / "key"
    with ThreadPoolExecutor(8) as threads:
        made = set(threads.map(read_or_make_key, [file] * 8))
    assert made == {read_or_make_key(file)}
    assert len(file.read_bytes()) == KEY_BYTES
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in file.parent.iterdir()] == ["key"]
    assert read_or_make_key(None) != read_or_make_key(None)


def test_a_key_that_cannot_be_used_is_one_line(tmp_path):
    file = tmp_path / "key"
    file.write_bytes(b"short")
    file.chmod(0o600)
    with pytest.raises(UserError, match="has 32 bytes, this has 5") as short:
        read_or_make_key(file)
    file.write_bytes(SECRET)
    file.chmod(0o640)
    with pytest.raises(UserError, match="others may read the key of the prefix cache: chmod 600 it") as open_to_others:
        read_or_make_key(file)
    with pytest.raises(UserError, match="the key of the prefix cache: Is a directory") as folder:
        read_or_make_key(_private(tmp_path / "folder"))
    for caught in (short, open_to_others, folder):
        assert str(tmp_path) in str(caught.value)
        assert "\n" not in str(caught.value)


def _private(folder):
    folder.mkdir(mode=0o700)
    return folder
