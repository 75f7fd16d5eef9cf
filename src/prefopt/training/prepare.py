"""What a run needs before anything trains: the model, the examples, and the way they are run."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from prefopt.data.store import JoinedTrees
from prefopt.engine.batch import Sharing
from prefopt.errors import ModelError
from prefopt.methods.method import Method
from prefopt.models.load import LoadedModel, Precision, checkpoint_activations, layers_that_recompute, load_model
from prefopt.models.padding import choose_padding
from prefopt.models.policy import Policy
from prefopt.models.proof import prove
from prefopt.models.quantise import num_parameters
from prefopt.models.reference_cache import weights_digest
from prefopt.models.save import end_ids
from prefopt.training.cut import check_fits
from prefopt.training.examples import RunData, load_data, within_context, within_data
from prefopt.training.group.processes import Processes
from prefopt.training.memory.check import MemoryCheck
from prefopt.training.memory.estimate import precision_of
from prefopt.training.optimizer import usual_learning_rate
from prefopt.training.order import DataOrder
from prefopt.training.record.resume import facts_to_agree_on
from prefopt.training.settings import RunSettings
from prefopt.training.terminal.narrator import Narrator
from prefopt.training.terminal.words import opening_lines
from prefopt.trees import PromptTree

LOOKED_AT = 256
"""Examples whose tokens are looked at for what answers end in, which is the same in all, and what else texts use."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run, but for its reference and its optimizer.

    Attributes:
        given, settings: as they were given, and as the model's context and the number of examples allow.
        loaded, precision: the model.
        fingerprint: digest of all its weights, the adapter's included.
        data, order: the examples, and which of them each step takes.
        policy: the model on the fastest way that is right on it.
        learning_rate, usual_learning_rate: the peak, and what it would be by default.
    """

    given: RunSettings
    settings: RunSettings
    loaded: LoadedModel
    precision: Precision
    fingerprint: str
    data: RunData
    order: DataOrder
    policy: Policy
    learning_rate: float
    usual_learning_rate: float


def prepare(method: Method, given: RunSettings, memory: MemoryCheck | None, processes: Processes, narrator: Narrator) -> Prepared:
    """Load the model and the examples, and find out how to run them.

    Args:
        method: of the run.
        given: its settings.
        memory: says whether the examples will fit; None: nobody asks.
        processes, narrator: of the run.

    Raises:
        PrefoptError: the model or the data cannot be used, or processes do not have the same.
    """
    torch.manual_seed(given.seed % 2**63)  # any whole number will do
    precision = precision_of(given, processes.device)
    apart = given.parallel == "fsdp" and processes.count > 1  # no device ever holds the whole model
    where = torch.device("cpu") if apart else processes.device
    loaded = load_model(given, precision=precision, device=where, seed=given.seed, kind=method.needs.model)
    settings = within_context(given, loaded, narrator)
    usual_rate = usual_learning_rate(method.rates, num_parameters(loaded.model), adapter=loaded.adapter is not None)
    learning_rate = settings.learning_rate or usual_rate
    with processes.main_first():
        data = load_data(method, settings, loaded, narrator)
    if loaded.kind == "reward":
        narrator.say(f"padding: {give_padding(loaded, data)}, which ends no answer: a reward model's score is that of the last other token")
    proved = partial(
        prove, loaded.model, max_length=settings.max_length, autocast=precision.autocast, apart=processes.device if apart else None
    )
    proof = proved(sharing=settings.sharing)
    fingerprint = weights_digest(loaded.model.state_dict())
    processes.agree(facts_to_agree_on(method, settings, fingerprint, data.facts["fingerprint"], proof.path))
    check_fits(JoinedTrees(data.train, data.held_out), max_tokens=settings.max_tokens, sharing=proof.path.sharing)
    settings = within_data(settings, len(data.train) if data.mix is None else data.mix.num_per_epoch, narrator)
    order = DataOrder(len(data.train), settings.batch_size, settings.seed, settings.epochs, settings.max_steps, data.mix)
    for line in opening_lines(method, settings, loaded, precision, order, learning_rate, proof.sentence(), processes):
        narrator.say(line)
    if make_room(memory, loaded, data.train, proof.path.sharing, processes, narrator):
        proved(sharing=proof.path.sharing)  # with recomputation, which no layer did the first time
    policy = Policy(loaded.model, proof.path)
    return Prepared(given, settings, loaded, precision, fingerprint, data, order, policy, learning_rate, usual_rate)


def give_padding(loaded: LoadedModel, data: RunData) -> str:
    """Settle on a reward model's padding token, now that it is known what answers end in; its name.

    Raises:
        ModelError: as `choose_padding`.
    """
    some = [*data.held_out[:LOOKED_AT], *(data.train[place] for place in range(min(LOOKED_AT, len(data.train))))]
    last = {int(completion.ids[-1]) for tree in some for completion in tree.completions}
    used = {
        token for tree in some for ids in (tree.prompt_ids, *(completion.ids for completion in tree.completions)) for token in ids.tolist()
    }
    return choose_padding(loaded, last | end_ids(loaded, data.end_of_turn), used)


def make_room(
    memory: MemoryCheck | None,
    loaded: LoadedModel,
    trees: Sequence[PromptTree],
    sharing: Sharing,
    processes: Processes,
    narrator: Narrator,
) -> int:
    """Let as many layers recompute as the run needs to fit, where that is left to it, and say so; or that it may not fit.

    Args:
        memory: says whether the examples will fit; None: nobody asks.
        loaded: the model, in place.
        trees: examples of the run.
        sharing: how completions share their prompt; those that continue from a cache need what recomputation leaves out.
        processes, narrator: of the run.

    Returns:
        the number of layers; 0: none was needed, or none helps.
    """
    micro = None if memory is None else memory.largest_micro_batch(trees, sharing)
    wanted = 0
    if memory is not None and micro is not None and sharing != "fork":
        wanted = memory.fitting_layers(micro) or 0
    # All do alike, as much as the one with least memory needs.
    layers = int(processes.collect(torch.tensor([float(wanted)])).max())
    if layers:
        depth = len(layers_that_recompute(loaded.model))
        try:
            checkpoint_activations(loaded.model, layers if depth else None)
        except ModelError:  # not every architecture can
            layers = 0
        else:
            which = f"the first {layers} of {depth} layers recompute" if 0 < layers < depth else "all layers recompute"
            narrator.say(
                f"memory: {which} their activations in the backward pass, so that the run fits (--gradient-checkpointing off: none does)"
            )
    if memory is not None and micro is not None:
        known = memory if not layers else memory.with_layers(layers)
        if warning := known.note(micro):
            narrator.say(warning)
    return layers
