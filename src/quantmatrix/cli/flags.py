"""Flags: those of a request, without the ones that a command has no use for."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

GENERATION = (
    *("prompt", "negative_prompt", "height", "width", "num_frames", "num_inference_steps"),
    *("guidance_scale", "seed"),
)
"""What is generated, by the names of the parsed flags."""
ACCELERATION = ("compile", "cuda_graph")
OFFLOAD = ("dit_layerwise_offload", "dit_cpu_offload")
QUANTIZED = (
    *("enable_svdquant", "quantization_precision", "quantization_rank", "quantization"),
    *("quantization_ignored_layers", "witness", "nvfp4_layout", "nibble_order"),
)
"""How a quantized checkpoint is read."""
ADAPTERS = ("lora_path", "lora_weight_name", "lora_scale")
SAVING = ("save_output",)


def remove_flags(parser: argparse.ArgumentParser, *names: str) -> None:
    """Take flags off a parser, by the names of their values: giving one is an error."""
    for action in [action for action in parser._actions if action.dest in names]:
        parser._remove_action(action)
        for option in action.option_strings:
            del parser._option_string_actions[option]
        for group in parser._action_groups:
            if action in group._group_actions:
                group._group_actions.remove(action)


def hide_flags(parser: argparse.ArgumentParser, *names: str) -> None:
    """Leave flags out of `--help`, by the names of their values: they are accepted, and change nothing."""
    for action in parser._actions:
        if action.dest in names:
            action.help = argparse.SUPPRESS


UNSAID = {
    "json": "print the result as JSON",
    "save_output": "write no picture or clip",
    "negative_prompt": "what the output should not show",
    "num_frames": "frames of a clip (default: the model's)",
    "num_inference_steps": "denoising steps (default: the model's)",
    "guidance_scale": "strength of the prompt (default: the model's)",
}
"""Help of flags that are added without, by the names of their values."""


def list_parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and those of all its commands and actions, each once."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from list_parsers(below)


def fill_help(parser: argparse.ArgumentParser) -> None:
    """Say what every flag does, where nothing else does."""
    for one in list_parsers(parser):
        for action in one._actions:
            if action.help is None and action.dest in UNSAID:
                action.help = UNSAID[action.dest]
