"""What the currents of a freshly initialised SNN-BERT are like, and so at which thresholds its neurons start."""

import math

from .configuration_snn_bert import SNNBertConfig


class InitialCurrents:
    """Mean and standard deviation of the neurons' currents in a freshly initialised model.

    A threshold that is fixed in absolute units leaves a network silent when its weights are small. So thresholds
    start `config.v_threshold` standard deviations above the mean of the potential, which is known before training:
    LayerNorm gives unit variance, a Linear of random weights adds up as many of them as spikes arrive, and a leaky
    mean narrows what it averages.
    """

    # Attention starts as a plain average of the value spikes; its spread is that of a mean over about so many tokens.
    TOKENS = 64

    def __init__(self, config: SNNBertConfig) -> None:
        self.config = config
        tail = 0.5 * math.erfc(config.v_threshold / math.sqrt(2))
        self.firing_rate = tail if config.spike_type == "binary" else min(2 * tail, 1.0)
        # What the leaky mean or sum over independent currents makes of their mean and standard deviation.
        self.gain_of_mean = self.gain_of_deviation = 1.0
        if config.neuron_type == "bpsn":
            total, squares = 1 / (1 - config.decay), 1 / (1 - config.decay**2)
            if config.bidirectional:
                total, squares = 2 * total - 1, 2 * squares - 1
            norm = total if config.normalize else 1.0
            self.gain_of_mean, self.gain_of_deviation = total / norm, math.sqrt(squares) / norm

    def normed(self) -> float:
        """Threshold for a LayerNorm's output."""
        return self.config.v_threshold * self.gain_of_deviation

    def linear(self, fan_in: int) -> float:
        """Threshold for the output of a Linear that is fed by spikes."""
        return self.normed() * self.config.initializer_range * math.sqrt(self.firing_rate * fan_in)

    def context(self) -> float:
        """Threshold for the attention's output, a mean of value spikes."""
        if self.config.spike_type == "binary":
            mean, variance = self.firing_rate, self.firing_rate * (1 - self.firing_rate)
        else:
            mean, variance = 0.0, self.firing_rate
        scale = 1.0
        if self.config.attention_type == "spiking":
            head_size = self.config.hidden_size // self.config.num_attention_heads
            scale = math.sqrt(head_size) * mean**2 if mean else self.firing_rate
        return scale * (mean * self.gain_of_mean + self.normed() * math.sqrt(variance / self.TOKENS))
