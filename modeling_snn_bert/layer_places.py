"""The places of an encoder layer: where its neurons stand, which Linears their spikes enter, and what they are called.

Whoever looks into a layer finds its modules by these names, which are the modules' own. A BERT's Linears have them too.
"""

from typing import NamedTuple

HIDDEN, INNER = "hidden_size", "intermediate_size"


class Place(NamedTuple):
    """Where a neuron stands in an encoder layer.

    Attributes:
        neuron: the name of its module, within the layer.
        label: what it is called in pictures and tables.
        width: the setting of the configuration that is its number of channels.
        linears: the names of those that its spikes enter; none for queries, keys and values, which meet in attention.
        source: the name of the Linear whose currents it receives; `None` for hidden states and attention's context.
    """

    neuron: str
    label: str
    width: str
    linears: tuple[str, ...] = ()
    source: str | None = None


# In the order in which the neurons fire.
PLACES = (
    Place(
        "attention.self.neuron",
        "attention input",
        HIDDEN,
        ("attention.self.query", "attention.self.key", "attention.self.value"),
    ),
    Place("attention.self.query_neuron", "query", HIDDEN, source="attention.self.query"),
    Place("attention.self.key_neuron", "key", HIDDEN, source="attention.self.key"),
    Place("attention.self.value_neuron", "value", HIDDEN, source="attention.self.value"),
    Place("attention.output.neuron", "attention output", HIDDEN, ("attention.output.dense",)),
    Place("intermediate.neuron", "MLP input", HIDDEN, ("intermediate.dense",)),
    Place("output.neuron", "MLP hidden", INNER, ("output.dense",), "intermediate.dense"),
)
# The Linears by name, and the settings that are their numbers of inputs and outputs. One with no neuron behind it adds
# to the hidden states.
LINEARS = {
    linear: (place.width, next((other.width for other in PLACES if other.source == linear), HIDDEN))
    for place in PLACES
    for linear in place.linears
}


def place_of(name: str) -> tuple[int, Place]:
    """The index of the encoder layer, and the place in it, of the neuron called `name` by a model's `neuron_names()`.

    Raises:
        ValueError: if no neuron of an encoder layer has that name.
    """
    layer, _, neuron = f".{name}".rpartition(".layer.")[2].partition(".")
    for place in PLACES:
        if place.neuron == neuron and layer.isdecimal():
            return int(layer), place
    raise ValueError(
        f"`name` must be that of a neuron in a layer, such as 'encoder.layer.0.output.neuron', got {name!r}"
    )


def short_name(name: str) -> str:
    """`encoder.layer.3.attention.self.query_neuron` as `layer 3, query`."""
    layer, place = place_of(name)
    return f"layer {layer}, {place.label}"
