"""What is read from compiled programs, and what is worked out from it."""

import itertools

import jax
import pytest

from bn_jax.bench import scaling
from bn_jax.bench.peers import OURS
from bn_jax.bench.report import save
from bn_jax.bench.scaling import RESNET50, Collective, Exchange, collectives, doubling, ring

pytestmark = pytest.mark.usefixtures("lenient")


def test_resnet50_has_53_batch_norms():
    assert len(RESNET50) == 53
    assert sum(RESNET50) == 26_560
    assert RESNET50[:5] == (64, 64, 64, 256, 64)
    assert RESNET50[-1] == 2048


# Simulations: devices that hold values and send them, each value of one byte.


class Network:
    """Counts what each device sends."""

    def __init__(self, devices):
        self.size, self.messages = [0] * devices, [0] * devices

    def send(self, sender, values):
        self.size[sender] += len(values)
        self.messages[sender] += 1
        return values

    def traffic(self):
        """Of one device, and all send the same."""
        (size,), (messages,) = set(self.size), set(self.messages)
        return size, messages


def simulate_ring_gather(n, parts, network):
    """Device d starts with part d, and passes on to d + 1 what it got last."""
    held = [{d: parts[d]} for d in range(n)]
    for turn in range(n - 1):
        arriving = [((d - turn) % n, held[d][(d - turn) % n]) for d in range(n)]
        for d, (index, values) in enumerate(arriving):
            held[(d + 1) % n][index] = network.send(d, values)
    return held


def simulate_ring_reduce(n, arrays, network):
    """Sums travel round, each growing on its way; then they are gathered."""
    width = len(arrays[0]) // n
    chunks = [[a[i * width : (i + 1) * width] for i in range(n)] for a in arrays]
    for turn in range(n - 1):
        sent = [network.send(d, chunks[d][(d - turn) % n]) for d in range(n)]
        for d, values in enumerate(sent):
            mine = chunks[(d + 1) % n]
            index = (d - turn) % n
            mine[index] = [a + b for a, b in zip(mine[index], values, strict=True)]
    owned = {(d + 1) % n: chunks[d][(d + 1) % n] for d in range(n)}
    gathered = simulate_ring_gather(n, [owned[d] for d in range(n)], network)
    return [[v for i in range(n) for v in held[i]] for held in gathered]


def simulate_doubling(n, arrays, network, join):
    """In round k, devices whose numbers differ in bit k exchange all that they have."""
    held = list(arrays)
    bit = 1
    while bit < n:
        sent = [network.send(d, held[d]) for d in range(n)]
        held = [join(held[d & ~bit], sent[d | bit]) for d in range(n)]
        bit *= 2
    return held


def add(a, b):
    return [p + q for p, q in zip(a, b, strict=True)]


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8])
def test_ring(n, each=6):
    arrays = [[d * 100 + i for i in range(n * each)] for d in range(n)]
    network = Network(n)
    sums = simulate_ring_reduce(n, arrays, network)
    assert sums == [[sum(column) for column in zip(*arrays, strict=True)]] * n
    assert network.traffic() == ring(Collective("all-reduce", n * each), n)

    network = Network(n)
    gathered = simulate_ring_gather(n, arrays, network)
    assert all(held == dict(enumerate(arrays)) for held in gathered)
    assert network.traffic() == ring(Collective("all-gather", n * each), n)


@pytest.mark.parametrize("n", [2, 4, 8])
def test_doubling(n, size=6):
    arrays = [[d * 100 + i for i in range(size)] for d in range(n)]
    network = Network(n)
    sums = simulate_doubling(n, arrays, network, add)
    assert sums == [[sum(column) for column in zip(*arrays, strict=True)]] * n
    assert network.traffic() == doubling(Collective("all-reduce", size), n)

    network = Network(n)
    gathered = simulate_doubling(n, arrays, network, list.__add__)
    assert gathered == [list(itertools.chain(*arrays))] * n
    assert network.traffic() == doubling(Collective("all-gather", size), n)


def test_doubling_wants_a_power_of_two():
    with pytest.raises(ValueError, match="power of 2"):
        doubling(Collective("all-reduce", 8), 6)


def test_one_device_sends_nothing():
    for kind in ("all-reduce", "all-gather"):
        for send in (ring, doubling):
            assert send(Collective(kind, 8), 1) == (0, 0)


# Reading programs.

PROGRAM = """
HloModule jit_step, entry_computation_layout={(f32[4,64]{1,0})->f32[4,64]{1,0}}
%region.all-reduce (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}
ENTRY %main (x: f32[4,64]) -> f32[4,64] {
  %all-reduce = (f32[64]{0}, f32[1,1,64]{2,1,0}) all-reduce(%a, %b), to_apply=%region.all-reduce
  %psum.7 = bf16[2,64]{1,0} all-reduce(%fusion), metadata={op_name="all-reduce(x)"}
  ROOT %all-gather.1 = f32[4,129]{1,0} all-gather(%c), replica_groups={{0,1,2,3}}, dimensions={0}
  %one = f64[] all-reduce(%d), to_apply=%region.all-reduce
  %element = f32[64]{0} get-tuple-element(%all-reduce), index=0
}
"""


def test_collectives_are_read_with_what_each_device_brings():
    assert collectives(PROGRAM, 4) == [
        Collective("all-reduce", 2 * 64 * 4),
        Collective("all-reduce", 2 * 64 * 2),
        Collective("all-gather", 129 * 4),
        Collective("all-reduce", 8),
    ]


@pytest.mark.parametrize("kind", ["reduce-scatter", "all-reduce-start", "collective-permute"])
def test_other_collectives_are_refused(kind):
    """Rather than overlooked."""
    with pytest.raises(ValueError, match=f"{kind} is neither"):
        collectives(f"%a = f32[64]{{0}} {kind}(%b), channel_id=1", 2)


# Measured, and the suite.


def test_scaling(tmp_path):
    """Flax's by its own source: one mean of both moments, or one of each; and their gradients'."""
    report = scaling.run(channels=(8, 8), devices=(2, 4))
    found = {(r["contender"], r["devices"]): r["collectives"] / 2 for r in report.rows}
    wanted = {OURS: 3, "flax": 2, "flax accurate": 4, "torch": 2}
    assert found == {(name, n): count for name, count in wanted.items() for n in (2, 4)}
    sizes = {r["contender"]: r["ring"]["size"] for r in report.rows if r["devices"] == 2}
    assert sizes["flax"] == 2 * 4 * (2 + 2) * 8
    assert all(bar.met for bar in report.bars)
    assert save([report], tmp_path).exists()


def test_layers_of_all_sizes_are_added_up(monkeypatch):
    def fake(channels):
        return {OURS: {size: Exchange([Collective("all-reduce", size)], []) for size in channels}}

    monkeypatch.setattr(scaling, "measure_apart", fake)
    rows = {r["contender"]: r for r in scaling.run(channels=(8, 24, 8), devices=(16,)).rows}
    assert rows[OURS]["collectives"] == 3
    assert rows[OURS]["ring"] == {"size": 2 * 15 / 16 * 40, "messages": 3 * 30}
    assert rows[OURS]["doubling"] == {"size": 4 * 40, "messages": 3 * 4}
    gathered, summed = 4 * (2 * 40 + 3), 4 * 2 * 40
    assert rows["torch"]["ring"] == {
        "size": 15 * gathered + 2 * 15 / 16 * summed,
        "messages": 3 * (15 + 30),
    }


def test_a_layer_that_sums_more_is_seen_and_misses_its_bars():
    layer = scaling.ours(8)

    def chatty(params, state, x, train):
        y, state = layer.apply(params, state, x, train)
        return y + jax.lax.psum(y.max(), scaling.AXIS), state

    exchange = scaling.exchange_of(layer._replace(apply=chatty), 8)
    assert [len(part) for part in exchange] == [3, 2]
    assert [bar.met for bar in scaling.bars({OURS: exchange})] == [False, False]
