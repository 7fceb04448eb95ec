"""ComfyUI-PackForcing: long video in a fixed amount of GPU memory. ComfyUI's entry to the pack.

The mappings are spelt out, not computed, because ComfyUI Manager reads them from the source without running it.
"""

from .nodes.cache_config import CacheConfigNode, CachePresetNode
from .nodes.inspector import CacheInspectorNode
from .nodes.live import LivePromptNode
from .nodes.loaders import CompressorLoaderNode, DemoModelsNode, ModelLoaderNode
from .nodes.prompts import ConditioningAtNode, PromptScheduleNode
from .nodes.sampler import LongVideoSamplerNode
from .nodes.side_by_side import SideBySideNode
from .nodes.state import LoadStateNode, SaveStateNode
from .nodes.timesteps import TimestepsNode

WEB_DIRECTORY = "./web"

NODE_CLASS_MAPPINGS = {
    "PackForcingModelLoader": ModelLoaderNode,
    "PackForcingCompressorLoader": CompressorLoaderNode,
    "PackForcingCacheConfig": CacheConfigNode,
    "PackForcingSampler": LongVideoSamplerNode,
    "PackForcingCacheInspector": CacheInspectorNode,
    "PackForcingDemoModels": DemoModelsNode,
    "PackForcingPromptSchedule": PromptScheduleNode,
    "PackForcingConditioningAt": ConditioningAtNode,
    "PackForcingSideBySide": SideBySideNode,
    "PackForcingCachePreset": CachePresetNode,
    "PackForcingTimesteps": TimestepsNode,
    "PackForcingSaveState": SaveStateNode,
    "PackForcingLoadState": LoadStateNode,
    "PackForcingLivePrompt": LivePromptNode,
}

NODE_DISPLAY_NAME_MAPPINGS = {
    "PackForcingModelLoader": "PackForcing Model Loader",
    "PackForcingCompressorLoader": "PackForcing Compressor Loader",
    "PackForcingCacheConfig": "PackForcing Cache Config",
    "PackForcingSampler": "PackForcing Long Video Sampler",
    "PackForcingCacheInspector": "PackForcing Cache Inspector",
    "PackForcingDemoModels": "PackForcing Demo Models",
    "PackForcingPromptSchedule": "PackForcing Prompt Schedule",
    "PackForcingConditioningAt": "PackForcing Conditioning At",
    "PackForcingSideBySide": "PackForcing Side By Side",
    "PackForcingCachePreset": "PackForcing Cache Preset",
    "PackForcingTimesteps": "PackForcing Timesteps",
    "PackForcingSaveState": "PackForcing Save State",
    "PackForcingLoadState": "PackForcing Load State",
    "PackForcingLivePrompt": "PackForcing Live Prompt",
}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
