"""Convolutional Q-networks as flat chains of small named layers, which a pipeline can cut anywhere.

`make_network` builds one of the zoo (Nature, IMPALA at any width, MinAtar, ResNet-18/34/50/101), `load_network` also
one of the user's. Every network takes uint8 frames ``[B, C, H, W]``, scales them itself and returns values
``[B, num_actions]``, or the logits that a distributional agent learns.
``network[a:b]`` is a stage; its parameters keep their global names.
"""

from mpdqn.networks.count import count_layer_macs, count_macs, count_parameters
from mpdqn.networks.exactness import check_exactness
from mpdqn.networks.heads import Head, output_shape
from mpdqn.networks.impala import Pooling
from mpdqn.networks.initialization import initialize
from mpdqn.networks.loading import NetworkFunction, as_chain, load_network, names_code
from mpdqn.networks.memory_format import MemoryFormat, choose_memory_format, set_memory_format
from mpdqn.networks.noisy import NoisyLinear, clear_noise, noisy_layers, set_noise
from mpdqn.networks.zoo import NAMES, make_network

__all__ = [
    "NAMES",
    "Head",
    "MemoryFormat",
    "NetworkFunction",
    "NoisyLinear",
    "Pooling",
    "as_chain",
    "check_exactness",
    "choose_memory_format",
    "clear_noise",
    "count_layer_macs",
    "count_macs",
    "count_parameters",
    "initialize",
    "load_network",
    "make_network",
    "names_code",
    "noisy_layers",
    "output_shape",
    "set_memory_format",
    "set_noise",
]
