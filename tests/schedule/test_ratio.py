"""The ratio of prefill to decode follows the load: on hand-made statistics."""

from cmjax.schedule import Bounds, Change, EngineStats, InstanceStats, RatioPolicy

BOUNDS = {"prefill": Bounds(1, 3), "decode": Bounds(1, 2)}


class Load:
    """Statistics of instances that are as loaded as one says, second by second."""

    def __init__(self, prefill=1, decode=1):
        self.names = [f"prefill{i}" for i in range(prefill)] + [f"decode{i}" for i in range(decode)]
        self.busy = dict.fromkeys(self.names, 0.0)
        self.now = 0.0

    def stats(self, prefill, decode, waiting):
        """After one more second, in which prefill instances were busy for `prefill`, and `decode` places taken."""
        self.now += 1
        instances = []
        for name in self.names:
            role = name[:-1]
            self.busy[name] += prefill if role == "prefill" else 1.0
            running = int(100 * decode) if role == "decode" else 0
            instances.append(InstanceStats(name, role, "ready", 2, running, 0, 10, 5, 1, 1, self.busy[name], 100, 8))
        empty = EngineStats(instances, waiting, 0, 0, 0, 0, 0, 0, 0, 0, 0, [], {})
        return self.now, empty

    def until_change(self, policy, limit=100, can_add=True, **levels):
        for _ in range(limit):
            change = policy.decide(*self.stats(**levels), {"prefill": can_add, "decode": can_add})
            if change is not None:
                return change
        return None


def test_a_loaded_role_gets_an_instance_and_an_idle_one_gives_one_up():
    policy = RatioPolicy(BOUNDS, patience_s=5)
    load = Load(prefill=1, decode=1)
    assert load.until_change(policy, prefill=0.95, decode=0.5, waiting=3) == Change(add="prefill")
    assert load.now == 7  # two samples to tell a share, and its patience
    assert load.until_change(policy, prefill=0.5, decode=0.95, waiting=3) == Change(add="decode")
    assert Load(3, 1).until_change(policy, prefill=0.1, decode=0.5, waiting=0) == Change(remove="prefill0")


def test_bounds_hold():
    policy = RatioPolicy(BOUNDS, patience_s=5)
    assert Load(3, 2).until_change(policy, prefill=1.0, decode=1.0, waiting=9) is None
    assert Load(1, 1).until_change(policy, prefill=0.0, decode=0.0, waiting=0) is None


def test_without_free_devices_the_idle_role_gives_some():
    policy, load = RatioPolicy(BOUNDS, patience_s=5), Load(1, 2)
    levels = {"prefill": 1.0, "decode": 0.1, "waiting": 3}
    assert load.until_change(policy, can_add=False, **levels) == Change(remove="decode0")
    load.names.remove("decode0")
    assert load.until_change(policy, **levels) == Change(add="prefill")
    assert Load(1, 1).until_change(RatioPolicy(BOUNDS, patience_s=5), can_add=False, **levels) is None


def test_a_short_peak_changes_nothing():
    policy, load = RatioPolicy(BOUNDS, patience_s=5), Load()
    for _ in range(20):
        assert load.until_change(policy, limit=4, prefill=1.0, decode=0.5, waiting=3) is None
        assert load.until_change(policy, limit=2, prefill=0.5, decode=0.5, waiting=0) is None
