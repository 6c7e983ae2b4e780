"""ShuffleNet V1, V2 and V2+, their knobs, and one registry for every model by name."""

from meshuffle.models.counting import count_macs, count_parameters
from meshuffle.models.heads import classifier_of, layer_names
from meshuffle.models.permutation import ChannelShuffle, channel_permutation
from meshuffle.models.registry import ModelInfo, create_model, list_models
from meshuffle.models.shufflenet_v1 import ShuffleNetV1
from meshuffle.models.shufflenet_v2 import ShuffleNetV2
from meshuffle.models.shufflenet_v2plus import ShuffleNetV2Plus

__all__ = [
    "ChannelShuffle",
    "ModelInfo",
    "ShuffleNetV1",
    "ShuffleNetV2",
    "ShuffleNetV2Plus",
    "channel_permutation",
    "classifier_of",
    "count_macs",
    "count_parameters",
    "create_model",
    "layer_names",
    "list_models",
]
