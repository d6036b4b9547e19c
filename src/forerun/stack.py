"""Stack: how a framework uses devices, overlaps, shards and keeps states, as data.

Constants of a software stack on a kind of device: physics first, a handful fitted, each of those
with the rows it rests on. The catalog holds them in `catalogs/stacks/`.
"""

from __future__ import annotations

from typing import Literal

from .document import Value


class Stack(Value, frozen=True, kw_only=True):
    """How well a software stack uses a kind of device; fractions of the device's nominal rates."""

    name: str
    gemm_efficiency: dict[str, float]
    """Large-GEMM fraction of `peak_flops_per_s`, by dtype."""
    gemm_half_k: float = 200.0
    """K0 in the efficiency K / (K + K0) of a GEMM with inner dimension K."""
    attention_forward_efficiency: float = 0.5
    attention_backward_efficiency: float = 0.4
    memory_efficiency: float = 0.8
    """Fraction of the memory bandwidth that elementwise operators reach."""
    elementwise_multiplier: float = 1.0
    """Traffic of elementwise operators relative to one read and one write per tensor."""
    intra_node_efficiency: float = 0.7
    inter_node_efficiency: float = 0.8
    interface_sharing: float = 1.0
    """Where a group has several members in a node that are not neighbours: the part of their
    network interfaces that it uses when it crosses nodes, one at least."""
    host_s_per_op: float = 5e-6
    """Host time to launch one operator; a layer cannot go faster than its launches."""
    communication_sms: int = 24
    """Streaming multiprocessors that a collective's kernels keep while they run (NCCL's channels):
    assumed."""
    streams_units: bool = True
    """Whether gathers and scatters of ZeRO 3 run beside compute."""
    unit_by_tensor: bool = False
    """Whether gathers and scatters of ZeRO 3 move each tensor of a unit by itself."""
    unit_multiplier: float = 1.0
    """Time of these gathers and scatters relative to the links'."""
    gathers_ahead: int = 1
    """Units that may be gathered before the one in use is done with: what FSDP2 does by itself, and
    FSDP's limiter of gathers allows."""
    exchange_overlap: float = 0.0
    """Where gradients are exchanged once per step: the part of the last backward that this runs
    beside, and of the next forward for parameters gathered after a sharded update. 0 = after it."""
    sharded_exchange_overlap: float | None = None
    """The same under ZeRO 1 and 2; None = the same."""
    sharded_reduce: Literal["reduce_scatter", "all_reduce"] = "reduce_scatter"
    """How gradients are summed there under ZeRO 1 and 2."""
    pipelines_tensor_parallel: bool = False
    """Whether gathers and scatters of a split sequence are cut up to run beside the matmuls before
    or behind them."""
    overlaps_weight_gradients: bool = False
    """Whether tensor-parallel sums of input gradients run beside the weights' gradients."""
    sequence_copies: bool = False
    """Whether sequence parallelism copies activations around its collectives, because they are
    batch-major and a gathered sequence must be contiguous (none at one sequence per micro-batch).
    Sequence-major stacks need none."""
    can_overlap: bool = True
    """Whether collectives run beside compute at all (gloo's copies use the same cores)."""
    tile_quantisation: float = 0.0
    """Exponent of the tile and wave efficiency of GEMMs: 1 = fully felt, 0 = not at all."""
    misaligned: float = 0.4
    """Rate of a matmul whose weight has a side that is no multiple of 16 bytes (a vocabulary of
    50,257) relative to an aligned one. From the head of vtrain-single's models: some 75 TFLOP/s
    unpadded, 200 padded."""
    pads_vocab: bool = True
    """Whether a vocabulary that is no multiple of 8 gets rows that no token has."""
    low_precision_half_k: float | None = None
    """K0 of matmuls below 16 bits; None = `gemm_half_k`."""
    cast_multiplier: float = 1.0
    """Traffic of quantising matmul inputs and gradients relative to reading and writing them."""
    attention_head_exponent: float = 0.25
    """Exponent of head_dim/128 in the attention rate below 128."""
    unfused_attention_efficiency: float = 0.35
    """Rate of the batched matmuls of attention with scores in memory, at head_dim 128."""
    host_smoothness: float = 2.5
    """q in (gpu^q + host^q)^(1/q), the time of a layer whose host and device work overlap."""
    host_waits: bool = False
    """Whether the host waits for the device at the end of a micro-batch's forward and backward, as
    under timers that synchronise: the head's forward then hides no launch."""
    host_s_per_micro_batch: float = 0.0
    """Host time of a micro-batch beside its launches, charged where its loss is: batch, mask, mean
    of the loss, timers."""
    host_s_per_unit: float = 0.0
    """Host time of FSDP's hooks around a layer, in forward and in backward."""
    host_s_per_collective: float = 0.0
    """Host time per collective inside a layer."""
    collective_latency_s: float = 0.0
    """Per collective of data parallelism, times log2 of the ranks: launch, protocol, skew."""
    rowwise_fraction: float = 0.8
    """Rate of matmuls with a scale per row relative to one scale per tensor: assumed."""
    casts_weights: bool = False
    """Whether weights of matmuls below 16 bits are cast at every use, or once per step."""
    low_precision_gather: bool = False
    """Whether weights and split sequences are gathered in the dtype of fp8 matmuls."""
    selective_recompute: Literal["selective", "per_op"] = "selective"
    """What the stack means by selective recomputation: the attention core, or every second matmul
    and all that is cheap."""
    doubts_recompute: bool = False
    """Whether what tables say of recomputation is not believed, because the times they give would
    then ask for more than the device's peak: the fastest that fits is taken."""
    recompute_stops_early: bool = True
    """Whether recomputation ends once all saved tensors are back (PyTorch since 2.1), or runs the
    whole forward again."""
    distributed_optimizer_multiplier: float | None = None
    """`data_parallel_multiplier` under ZeRO 1 and 2; None = the same."""
    data_parallel_multiplier: float = 1.0
    """Exposed gradient exchange relative to its time (many small buckets: above 1)."""
    tensor_parallel_exposed: float = 1.0
    """Fraction of tensor-parallel communication that is not hidden."""
    expert_parallel_exposed: float = 1.0
    """Fraction of the experts' all-to-alls that is felt: copies of a token for experts of one rank
    are sent once, other micro-batches compute meanwhile."""
    ring_step_s: float = 2e-4
    """Per block of keys and values after the first that passes a context-parallel ring: streams
    that wait for one another, tails of smaller kernels. Assumed where it is not fitted."""
    compiled_elementwise: float = 1.0
    """Time of operators bound by memory in compiled layers relative to eager ones: fused."""
    compiles_ends: bool = True
    """Whether embedding, head and loss are compiled as well where layers are."""
    scatters_boundary: bool = False
    """Whether ranks of one tp group send a part each of what they all hold to the next stage."""
    pipeline_rounds: int | None = None
    """Micro-batches per pipeline rank where a table does not say; None = it is searched."""
    zero_stage: Literal[0, 1, 2, 3] | None = None
    """What the stack does where a table does not say; None = it depends on the layout."""
    finetuning_document_tokens: int | None = None
    """Mean length of the documents that its recipes for fine-tuning pack into a sequence, where
    attention stays inside each: assumed. None = one document fills the sequence."""
    runtime: Literal["eager", "compiled", "graphs"] | None = None
    """How the host launches operators where a table does not say; None = eager."""
    lora_targets: Literal["all", "qkv", "qv"] = "all"
    """Linears that get adapters where a table does not say: the stack's recipe."""
    optimizer_multiplier: float = 1.0
    """Traffic of the optimiser step relative to one pass over its states."""
    packed_updates: bool = False
    """Whether low-bit moments are moved as they are stored, by one kernel, or unpacked in memory on
    the way."""
    drift_per_doubling: float = 0.0
    """Relative slow-down per doubling of the devices beyond eight: jitter, slow nodes."""
    expert_efficiency: float = 1.0
    """Grouped matmuls of experts relative to a plain matmul of the same total size."""
    expert_imbalance: float = 1.0
    """Tokens of the busiest expert rank relative to the mean, where a plan does not say."""
    exchanges_counts: bool = False
    """Whether expert-parallel ranks first tell each other how many rows go where, and then sort
    what arrives by expert, as steps of their own (our executors); elsewhere these are left to the
    fitted constants."""
    sharding: Literal["fsdp", "megatron"] = "fsdp"
    """fsdp: parameters gathered and gradients scattered by units (FSDP2, ZeRO-3 style); megatron:
    16-bit parameters whole on the rank, gradients reduced once per step, states beside them."""
    reduce_bytes: float = 4.0
    """Per element of a gradient on the wire."""
    sources: tuple[str, ...] = ()
    """Words in a published table's `source` or `source_ref` that name this stack."""
    fitted: dict[str, str] = {}
    """Constants that were fitted: to which rows, with which residual; others are held."""
    # Memory. States per trained element (see `costmodel/states.py`):
    parameter_bytes: float | None = None
    """Per trained parameter at rest; None = 4 (fsdp) or 16 bits (megatron)."""
    gradient_bytes: float | None = None
    """Per element of a gradient at rest; None = 4."""
    master_bytes: float | None = None
    """Of an fp32 copy beside the parameter; None = 4 for megatron's 16-bit parameters, else 0."""
    moment_bytes: float = 8.0
    """Both moments of AdamW; low-bit optimisers have their own."""
    # what it keeps otherwise than the ledger of our executors (see `costmodel/kept.py`):
    keeps_operands: bool = False
    """Whether matmuls below 16 bits keep their quantised input for backward (Transformer Engine),
    instead of the 16-bit one."""
    logit_bytes: float | None = None
    """Per logit at the peak of the loss, copies and gradient included; None = as our loss does."""
    norm_input_bytes: float | None = None
    """Kept per element of a norm's input: 2 by a fused kernel, more where it is composed in fp32;
    None = as the operator graph says."""
    regathers_sequence: bool = False
    """Whether backward gathers a split sequence again instead of keeping it whole."""
    sequence_buffers: float = 0.0
    """Whole-sequence hidden tensors that the collectives of sequence parallelism keep allocated."""
    activation_multiplier: float = 1.0
    """What layers keep relative to the ledger: copies that it does not know of."""
    keeps_gradients: bool = False
    """Whether gradients stay allocated from step to step, zeroed instead of freed."""
    reshards: bool = True
    """Whether ZeRO 3 frees a gathered unit after use; else it stays to the end of backward."""
    frees_copies: bool = False
    """Whether 16-bit copies of parameters that no rank shares are freed unit by unit as well."""
    # and what comes on top of tensors:
    context_bytes: int = 0
    """Memory of the device context and communicators before the first tensor."""
    runtime_bytes: int = 0
    """Memory that training takes besides context and tensors: libraries' own, allocator arenas."""
    fragmentation: float = 0.0
    """Allocator waste as a fraction of the peak of live tensors."""
    memory_source: str = ""
    """Where the constants of memory come from."""
    memory_spread: float = 0.08
    """Relative standard deviation of a predicted peak of memory."""
    spread: float = 0.15
    """Relative standard deviation of a predicted operator time."""
    source: str = ""
