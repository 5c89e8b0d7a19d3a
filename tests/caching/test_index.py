"""The index of a node, beside one made of plain dictionaries."""

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from cmjax.serve.caching.index import Index

DIGESTS = st.integers(0, 12)
NAMESPACES = st.sampled_from("abc")


class IndexMachine(RuleBasedStateMachine):
    """Adds, uses and removes at random."""

    def __init__(self):
        super().__init__()
        self.index = Index()
        self.known = {}  # digest -> (namespace, bytes, parts, version, used, on disk), in order of use
        self.turn = 0

    @rule(digest=DIGESTS, namespace=NAMESPACES, num_bytes=st.integers(0, 2**40), on_disk=st.booleans())
    def add(self, digest, namespace, num_bytes, on_disk):
        if digest not in self.known:
            self.turn += 1
            slot = self.index.add(namespace, digest, num_bytes, self.turn % 9, -self.turn, self.turn)
            if on_disk:
                self.index.on_disk.append(Index.DISK, slot)
            self.known[digest] = (namespace, num_bytes, self.turn % 9, -self.turn, self.turn, on_disk)

    @rule(digest=DIGESTS)
    def touch(self, digest):
        if digest in self.known:
            self.turn += 1
            self.index.touch(self.index.find(digest), self.turn)
            *entry, _, on_disk = self.known.pop(digest)
            self.known[digest] = (*entry, self.turn, on_disk)

    @rule(digest=DIGESTS)
    def remove(self, digest):
        if self.known.pop(digest, None):
            self.index.remove(self.index.find(digest))

    @rule(digest=DIGESTS)
    def leave_the_disk(self, digest):
        if digest in self.known and self.known[digest][-1]:
            self.index.on_disk.remove(self.index.find(digest))
            self.known[digest] = (*self.known[digest][:-1], False)

    @rule(data=st.data())
    def sort(self, data):
        """Times of use that were found out of order, as at a start."""
        order = data.draw(st.permutations(list(self.known)))
        for digest in order:
            self.turn += 1
            self.index.used[self.index.find(digest)] = self.turn
            *entry, _, on_disk = self.known.pop(digest)
            self.known[digest] = (*entry, self.turn, on_disk)
        self.index.sort()

    @invariant()
    def it_is_as_the_model(self):
        index = self.index
        assert len(index) == len(self.known)
        assert all((index.find(digest) is not None) == (digest in self.known) for digest in range(13))
        for namespace in "abc":
            ours = [digest for digest, entry in self.known.items() if entry[0] == namespace]
            assert [index.digests[slot] for slot in index.slots(namespace)] == ours
            oldest = index.oldest(namespace)
            assert (None if oldest is None else index.digests[oldest]) == next(iter(ours), None)
        on_disk = [index.digests[slot] for slot in index.on_disk.of(Index.DISK)]
        assert on_disk == [digest for digest, entry in self.known.items() if entry[-1]]
        assert sorted(index.digests[slot] for slot in index.slots()) == sorted(self.known)
        for digest, entry in self.known.items():
            slot = index.find(digest)
            found = (index.namespace(slot), index.num_bytes[slot], index.num_parts[slot], index.versions[slot])
            assert (*found, index.used[slot], slot in index.on_disk) == entry


def test_the_index_is_as_plain_dictionaries():
    run_state_machine_as_test(IndexMachine)
