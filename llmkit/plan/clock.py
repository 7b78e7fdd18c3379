"""How long a step takes on GPUs: a roofline of its products, passes over memory and messages. Torch-free.

Nothing here is fitted to a measurement: rates are data sheets times the shares below, which are what large products,
fused attention and NCCL are commonly seen to reach. So a plan compares meshes well, and predicts a time to a third at best.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmkit.model.config import GPTConfig, count_params
from llmkit.plan.cost import BYTES, attention_flops_per_token
from llmkit.plan.job import Job, Net, Pass
from llmkit.plan.mesh import Cluster, Mesh, params_of, share_of

_MEMORY, _LINK, _NETWORK = 0.8, 0.75, 0.8  # of the data sheets' bandwidths
_OVERLAP = 0.85  # of messages that may travel beside products: they take units and memory from them
_HOP_S = 5e-6  # a message's way from one node to the next, or around a node
_LAUNCH_S = 4e-6  # from one kernel's start to the next's, where the GPU is faster than Python
_KERNELS = {True: 30, False: 95}  # of a block, forward and backward: compiled, eager
_HOST_GB_PER_S = 25.0  # from a GPU to its node's memory
_PAGED_GB_PER_S = 10.0  # the same where that memory isn't pinned
_MAIN_GB_PER_S = 200.0  # of a node's processors to their own memory


@dataclass(frozen=True)
class Step:
    """Seconds of one optimizer step, by what they are spent on; messages only as far as products don't hide them."""

    seconds: dict[str, float]
    messages: dict[str, float]
    """Bytes that one rank sends in a step, by why."""
    flops: float
    peak: float

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def mfu(self) -> float:
        """Useful work as a share of what all GPUs could do."""
        return self.flops / (self.total * self.peak)


def products(model: GPTConfig, tensor: int = 1) -> list[tuple[int, int, float]]:
    """(inputs, outputs, how many) of the matrices of one block that a token meets, after a cut by `tensor`."""
    D, heads, kv = model.d_model, model.n_heads * model.width_of_head, model.kv_heads * model.width_of_head
    attention = [(D, heads // tensor, 1.0), (D, max(1, kv // tensor), 2.0), (heads // tensor, D, 1.0)]
    width = (model.width_of_mlp if model.experts is None else model.experts.active_width) // tensor
    return [*attention, (D, width, 2.0 if model.mlp == "swiglu" else 1.0), (width, D, 1.0)]


class Clock:
    """Seconds of a job's parts on one mesh."""

    def __init__(self, job: Job, mesh: Mesh, cluster: Cluster):
        peak = cluster.gpu.peak_flops(job.precision)
        assert peak is not None, "refused before"
        self.job, self.mesh, self.cluster, self.peak = job, mesh, cluster, peak
        self.product, self.attention = cluster.gpu.product_frac * peak, cluster.gpu.attention_frac * peak
        self.memory = _MEMORY * 1e9 * cluster.gpu.memory_gb_per_s
        self.sent: dict[str, float] = {}

    def step(self) -> Step:
        """All that happens between one update and the next."""
        spent: dict[str, float] = {}
        for p in self.job.passes:
            name = {"train": "forward, backward", "ask": "forward of others", "write": "answers"}[p.kind]
            seconds = {"train": self._train, "ask": self._ask, "write": self._write}[p.kind](p)
            spent[name] = spent.get(name, 0.0) + seconds[0]
            spent["messages"] = spent.get("messages", 0.0) + seconds[1]
        for net in self.job.trained:
            spent["optimizer"] = spent.get("optimizer", 0.0) + self._update(net)
            spent["messages"] += self._sum_up(net)
        if self.job.save_every is not None:  # asynchronous: training waits for the copy alone
            share = self.job.checkpoint_bytes / self.mesh.world
            spent["saving"] = share / (1e9 * _HOST_GB_PER_S) / self.job.save_every
        return Step(spent, self.sent, self.job.flops_per_step, self.peak * self.cluster.world)

    # --- work ------------------------------------------------------------------------------------------------------

    def _product(self, rows: float, K: int, N: int, width: int) -> float:
        """Seconds of [rows, K] x [K, N]: by the matrix units or by memory, whichever is slower."""
        moved = width * (rows * K + K * N + rows * N)
        return max(2 * rows * K * N / self.product, moved / self.memory)

    def _forward(self, p: Pass, rows: float) -> float:
        """Seconds of one forward pass of `rows` tokens, without the head."""
        model, width, t = p.net.model, BYTES[p.net.precision], self.mesh.tensor
        matrices = sum(n * self._product(rows, K, N, width) for K, N, n in products(model, t))
        if (experts := model.experts) is not None:  # every expert's weights are read, however few tokens it gets
            here = experts.n / (self.mesh.experts if p.kind == "train" else 1)
            matrices += 3 * model.d_model * experts.d_ff * here * width / self.memory / t
        attention = rows * attention_flops_per_token(model, p.seq_len) / 3 / t / self.attention
        if self.mesh.context > 1 and p.kind == "train" and not self.job.recompute:
            attention *= 4 / 3  # ranks that share rows compute it again in the backward pass
        passes = 9 if self.job.compiled else 22  # over the residual stream; over the MLP's width a third as many
        stream = passes * (model.d_model + model.width_of_mlp / 3) / t * rows * width / self.memory
        return model.n_layers * (matrices + stream) + attention

    def _head(self, p: Pass, rows: float) -> float:
        if not p.with_head:
            return 0.0
        model, V = p.net.model, p.net.model.vocab_size or 0
        logits = self._product(rows, model.d_model, V, BYTES[p.net.precision])
        return logits + 5 * 4 * rows * V / self.memory  # softmax in fp32

    def _train(self, p: Pass) -> tuple[float, float]:
        rows, n_micro = self._micro(p)
        n_micro = max(1.0, n_micro)
        work = self._forward(p, rows) * (3 + self.job.recompute) + 3 * self._head(p, rows)
        kernels = p.net.model.n_layers * _KERNELS[self.job.compiled] * (1 + 0.3 * self.job.recompute)
        compute = max(work, kernels * _LAUNCH_S)
        copies = self._copies(p.net, n_micro)
        return n_micro * compute, n_micro * (self._messages(p.net, rows, compute, n_micro) + copies)

    def _ask(self, p: Pass) -> tuple[float, float]:
        rows, n_micro = self._micro(p)
        work = self._forward(p, rows) + self._head(p, rows)
        compute = max(work, p.net.model.n_layers * 0.33 * _KERNELS[self.job.compiled] * _LAUNCH_S)
        return n_micro * compute, 0.0

    def _micro(self, p: Pass) -> tuple[float, float]:
        """Tokens of one forward pass on a rank, and how many passes a step has."""
        rows = self.job.micro_rows(self.mesh.data) * self.job.row_len
        return rows / self.mesh.context, p.tokens / self.mesh.data / rows

    def _write(self, p: Pass) -> tuple[float, float]:
        """Answers, a token at a time: every weight is read for each, and the cache. Tensor ranks write the same."""
        net, model, per_rank = p.net, p.net.model, p.tokens / p.new_tokens / self.mesh.data
        at_once = min(per_rank, float(p.side_by_side))
        rounds = math.ceil(per_rank / p.side_by_side) if per_rank > 1 else per_rank
        width, count = BYTES[net.precision], count_params(model)
        cache = self.job.cache_bytes(p) * at_once / p.side_by_side * (1 - p.new_tokens / p.seq_len / 2)
        read = (count.active * width + cache) / self.memory
        work = 2 * count.active * max(1.0, at_once) / self.product
        token = max(read, work, model.n_layers * 20 * _LAUNCH_S)
        whole = sum(
            other.cost.n_params * BYTES[other.precision] * (1 - share_of(other, self.mesh))
            for other in self.job.trained
        )
        self._send("whole copies for answers", whole)
        return rounds * p.new_tokens * token, whole / self._rate(self.mesh.members, 1)

    def _update(self, net: Net) -> float:
        """The optimizer reads and writes its rank's share; Muon's products are shared out too."""
        parts = self.mesh.members
        rate = 1e9 * _MAIN_GB_PER_S / self.cluster.per_node if self.mesh.offload else self.memory
        seconds = share_of(net, self.mesh) * net.cost.n_trained_params * 34 / rate
        if self.job.optimizer == "muon":
            D, whole = net.model.d_model, count_params(net.model).hidden
            seconds += 5 * 6 * whole * D / self.product / parts
            if parts > 1:
                self._send("momentum for Muon", 4.0 * whole * (1 - 1 / parts))
                seconds += 4.0 * whole * (1 - 1 / parts) / self._rate(parts, 1)
        return seconds

    # --- messages --------------------------------------------------------------------------------------------------

    def _rate(self, group: int, apart: int) -> float:
        """Bytes a second that each of a group of ranks passes on, by NCCL's rings.

        A node's members pass on the same bytes, each over its own adapter a part of them: so the fewer of a node's GPUs
        are in a group, the slower it is between nodes.

        Args:
            group: how many ranks.
            apart: from one to the next in rank numbers.
        """
        inside = _LINK * self.cluster.gpu.link_gb_per_s
        if group * apart <= self.cluster.per_node:
            return 1e9 * inside
        members = max(1, self.cluster.per_node // apart)
        return 1e9 * min(inside, _NETWORK * self.cluster.network_gb_per_s * members)

    def _swap(self, n_bytes: float) -> float:
        """Seconds in which a rank sends so many bytes to the others of its experts, as many to each: what leaves the node
        goes over its own adapter."""
        n, inside = self.mesh.experts, self.cluster.per_node
        far = max(0, n - inside) / (n - 1)
        within = (1 - far) * n_bytes / (1e9 * _LINK * self.cluster.gpu.link_gb_per_s)
        return max(within, far * n_bytes / (1e9 * _NETWORK * self.cluster.network_gb_per_s))

    def _send(self, why: str, n_bytes: float) -> None:
        if n_bytes:
            self.sent[why] = self.sent.get(why, 0.0) + n_bytes

    def _copies(self, net: Net, n_micro: float) -> float:
        """Seconds in which a micro-batch's shares go from main memory to the GPU, twice, and fp32 gradients back: a process
        waits for copies of memory that isn't pinned."""
        if not self.mesh.offload:
            return 0.0
        trained = net.cost.n_trained_params
        frozen = net.cost.n_params - trained
        shares = 4 * trained + BYTES[net.precision] * frozen  # what is frozen lies there as it was rounded
        n_bytes = share_of(net, self.mesh) * (2 * shares + 4 * trained)
        self._send("copies from and to main memory", n_bytes * n_micro)
        return n_bytes / (1e9 * _PAGED_GB_PER_S)

    def _messages(self, net: Net, rows: float, compute: float, n_micro: float) -> float:
        """Seconds of one micro-batch's messages that its products don't hide."""
        shards, t, width = self.mesh.shards, self.mesh.tensor, BYTES[net.precision]
        seconds = 0.0
        if t > 1:  # put together before attention and MLP, added up after them; nothing computes meanwhile
            each = rows * net.model.d_model * width * (t - 1) / t
            # Four messages forward, four backward, and two for what is put together once more; where a block is computed
            # again, all of its forward pass but the last.
            times = 4 + 4 + (3 if self.job.recompute else 2)
            n_bytes = net.model.n_layers * each * times
            self._send("tensor", n_bytes * n_micro)
            seconds += n_bytes / self._rate(t, 1) + net.model.n_layers * times * _HOP_S
        if (c := self.mesh.context) > 1:  # put together twice, and the gradients added up; nothing computes meanwhile
            kept = 2 * net.model.kv_heads * net.model.width_of_head * width / t
            n_bytes = net.model.n_layers * rows * kept * (c - 1) * 3
            self._send("keys and values", n_bytes * n_micro)
            seconds += n_bytes / self._rate(c, t) + net.model.n_layers * 2 * _HOP_S
        if (e := self.mesh.experts) > 1 and (experts := net.model.experts) is not None:
            # States to the experts and back, and their gradients; nothing computes meanwhile.
            each = rows * experts.n_active * net.model.d_model * width * (e - 1) / e
            n_bytes = net.model.n_expert_layers * each * (4 + 2 * self.job.recompute)
            self._send("visits of experts", n_bytes * n_micro)
            seconds += self._swap(n_bytes) + net.model.n_expert_layers * 4 * _HOP_S
        if shards > 1:
            trained = net.cost.n_trained_params / net.cost.n_params
            rest, own = params_of(net, self.mesh)
            same = max(1, shards // e)  # ranks with the same experts share these
            # Weights twice, fp32 gradients once.
            rest_bytes, own_bytes = (
                params * (n - 1) / n * (2 * width + 4 * trained) for params, n in ((rest, shards), (own, same))
            )
            self._send("sharded weights and gradients", (rest_bytes + own_bytes) * n_micro)
            hops = max(1, shards * t // self.cluster.per_node) * _HOP_S
            travelling = rest_bytes / self._rate(shards, t) + own_bytes / self._rate(same, t * e)
            travelling += net.model.n_layers * 3 * hops
            seconds += max(travelling - _OVERLAP * compute, travelling / net.model.n_layers)
        return seconds

    def _sum_up(self, net: Net) -> float:
        """Seconds in which copies of the state add up their gradients: after the last backward pass, hidden by nothing."""
        mesh, copies = self.mesh, self.mesh.copies
        if copies == 1:
            return 0.0
        rest, own = (n / net.cost.n_params * 2 * net.cost.gradient_bytes for n in params_of(net, mesh))
        rest, same = rest / mesh.shards, max(mesh.shards, mesh.experts)
        own, owners = own * mesh.experts / same, mesh.world // mesh.tensor // same
        rest_bytes, own_bytes = rest * (copies - 1) / copies, own * (owners - 1) / owners
        self._send("gradients of copies", rest_bytes + own_bytes)
        return rest_bytes / self._rate(copies, mesh.shards * mesh.tensor) + own_bytes / self._rate(
            owners, same * mesh.tensor
        )
