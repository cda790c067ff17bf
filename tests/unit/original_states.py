"""Original states: names and rows of state dicts as models' first releases have them.

A line is `name rows leaves`: rows as a multiple of a letter of the space (`3D`) or a number, leaves
`wb` (weight and bias; the default), `w`, `s` (scale) or `-` (the name is the tensor's). `*` stands for
the numbers of blocks. Written down from the releases themselves; what diffusers makes of them must be
the state dict of its own class.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

LEAVES = {"w": ("weight",), "b": ("bias",), "s": ("scale",)}


@dataclass(frozen=True)
class Space:
    """One model's original names."""

    options: Mapping[str, Any]
    """Of the class in diffusers, for few blocks of the published widths."""
    sizes: Mapping[str, int]
    text: str
    blocks: Mapping[str, range] = field(default_factory=dict)
    """Numbers of blocks by what a name begins with; else 0 and 1."""
    dropped: tuple[str, ...] = ()
    """Tensors that diffusers leaves aside."""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Of tensors that are no [rows, 2] or [rows]."""

    def lines(self) -> Iterator[tuple[str, int, str]]:
        """(name, rows, leaves) of everything that the space has."""
        for line in self.text.split("\n"):
            if not line.strip():
                continue
            name, rows, *leaves = line.split()
            for number in self._numbers(name):
                yield name.replace("*", str(number), 1), self._count(rows), (leaves or ["wb"])[0]

    def _numbers(self, name: str) -> range:
        if "*" not in name:
            return range(1)
        found = (own for start, own in self.blocks.items() if name.startswith(start))
        return next(found, range(2))

    def _count(self, rows: str) -> int:
        many, letter = re.fullmatch(r"(\d*)([A-Z]?)", rows).groups()  # type: ignore[union-attr]
        return int(many or 1) * self.sizes.get(letter, 1)

    def shapes_by_name(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor; weights have two columns, for converters look at rows alone."""
        found: dict[str, tuple[int, ...]] = {}
        for name, rows, leaves in self.lines():
            for leaf in [""] if leaves == "-" else [leaf for key in leaves for leaf in LEAVES[key]]:
                flat = leaf in ("bias", "scale") or "norm" in name.rpartition(".")[2]
                shape = (rows,) if flat else (rows, 2)
                found[f"{name}.{leaf}".rstrip(".")] = self.shapes.get(name, shape)
        return found

    def resize(self, **sizes: int) -> Space:
        """The same names at other widths."""
        return replace(self, sizes={**self.sizes, **sizes})

    def draw(self, seed: int = 0) -> dict[str, torch.Tensor]:
        """A random state dict, float32."""
        generator = torch.Generator().manual_seed(seed)
        return {
            name: torch.randn(*shape, generator=generator)
            for name, shape in self.shapes_by_name().items()
        }


_FLUX_BLOCKS = """
double_blocks.*.img_attn.qkv 3D
double_blocks.*.txt_attn.qkv 3D
double_blocks.*.img_attn.proj D
double_blocks.*.txt_attn.proj D
double_blocks.*.img_attn.norm.query_norm 128 s
double_blocks.*.img_attn.norm.key_norm 128 s
double_blocks.*.txt_attn.norm.query_norm 128 s
double_blocks.*.txt_attn.norm.key_norm 128 s
double_blocks.*.img_mlp.0 4D
double_blocks.*.img_mlp.2 D
double_blocks.*.txt_mlp.0 4D
double_blocks.*.txt_mlp.2 D
single_blocks.*.linear1 7D
single_blocks.*.linear2 D
single_blocks.*.norm.query_norm 128 s
single_blocks.*.norm.key_norm 128 s
"""

_WAN = """
patch_embedding D
text_embedding.0 D
text_embedding.2 D
time_embedding.0 D
time_embedding.2 D
time_projection.1 6D
head.head 64
head.modulation 1 -
blocks.*.modulation 1 -
blocks.*.norm3 D
blocks.*.ffn.0 F
blocks.*.ffn.2 D
blocks.*.self_attn.q D
blocks.*.self_attn.k D
blocks.*.self_attn.v D
blocks.*.self_attn.o D
blocks.*.self_attn.norm_q D w
blocks.*.self_attn.norm_k D w
blocks.*.cross_attn.q D
blocks.*.cross_attn.k D
blocks.*.cross_attn.v D
blocks.*.cross_attn.o D
blocks.*.cross_attn.norm_q D w
blocks.*.cross_attn.norm_k D w
"""

_Z_BLOCK = """
{block}.*.attention.qkv 3D w
{block}.*.attention.out D w
{block}.*.attention.q_norm 128 w
{block}.*.attention.k_norm 128 w
{block}.*.attention_norm1 D w
{block}.*.attention_norm2 D w
{block}.*.ffn_norm1 D w
{block}.*.ffn_norm2 D w
{block}.*.feed_forward.w1 F w
{block}.*.feed_forward.w2 D w
{block}.*.feed_forward.w3 F w
"""

_SD3_BLOCK = """
joint_blocks.*.{side}_block.attn.qkv 3D
joint_blocks.*.{side}_block.attn.ln_q 64 w
joint_blocks.*.{side}_block.attn.ln_k 64 w
"""
_SD3_REST = """
joint_blocks.{i}.{side}_block.attn.proj D
joint_blocks.{i}.{side}_block.mlp.fc1 4D
joint_blocks.{i}.{side}_block.mlp.fc2 D
"""

_HUNYUAN_SIDE = """
double_blocks.*.{side}_mod.linear 6D
double_blocks.*.{side}_attn_qkv 3D
double_blocks.*.{side}_attn_q_norm 128 w
double_blocks.*.{side}_attn_k_norm 128 w
double_blocks.*.{side}_attn_proj D
double_blocks.*.{side}_mlp.fc1 4D
double_blocks.*.{side}_mlp.fc2 D
"""

_LTX_ATTENTION = """
transformer_blocks.*.{attn}.to_q D
transformer_blocks.*.{attn}.to_k D
transformer_blocks.*.{attn}.to_v D
transformer_blocks.*.{attn}.to_out.0 D
transformer_blocks.*.{attn}.q_norm D w
transformer_blocks.*.{attn}.k_norm D w
"""

SPACES = {
    "FluxTransformer2DModel": Space(
        {"num_layers": 2, "num_single_layers": 2, "guidance_embeds": True},
        {"D": 3072},
        """
img_in D
txt_in D
time_in.in_layer D
time_in.out_layer D
vector_in.in_layer D
vector_in.out_layer D
guidance_in.in_layer D
guidance_in.out_layer D
double_blocks.*.img_mod.lin 6D
double_blocks.*.txt_mod.lin 6D
single_blocks.*.modulation.lin 3D
final_layer.linear 64
final_layer.adaLN_modulation.1 2D
"""
        + _FLUX_BLOCKS,
    ),
    "ChromaTransformer2DModel": Space(
        {"num_layers": 2, "num_single_layers": 2},
        {"D": 3072, "A": 5120},
        """
img_in D
txt_in D
final_layer.linear 64
distilled_guidance_layer.in_proj A
distilled_guidance_layer.out_proj D
distilled_guidance_layer.layers.*.in_layer A
distilled_guidance_layer.layers.*.out_layer A
distilled_guidance_layer.norms.* A s
"""
        + _FLUX_BLOCKS,
        blocks={"distilled_guidance_layer": range(5)},
    ),
    "Flux2Transformer2DModel": Space(
        {"num_layers": 2, "num_single_layers": 2},
        {"D": 6144},
        """
img_in D w
txt_in D w
time_in.in_layer D w
time_in.out_layer D w
guidance_in.in_layer D w
guidance_in.out_layer D w
double_stream_modulation_img.lin 6D w
double_stream_modulation_txt.lin 6D w
single_stream_modulation.lin 3D w
double_blocks.*.img_attn.qkv 3D w
double_blocks.*.txt_attn.qkv 3D w
double_blocks.*.img_attn.proj D w
double_blocks.*.txt_attn.proj D w
double_blocks.*.img_attn.norm.query_norm 128 s
double_blocks.*.img_attn.norm.key_norm 128 s
double_blocks.*.txt_attn.norm.query_norm 128 s
double_blocks.*.txt_attn.norm.key_norm 128 s
double_blocks.*.img_mlp.0 6D w
double_blocks.*.img_mlp.2 D w
double_blocks.*.txt_mlp.0 6D w
double_blocks.*.txt_mlp.2 D w
single_blocks.*.linear1 9D w
single_blocks.*.linear2 D w
single_blocks.*.norm.query_norm 128 s
single_blocks.*.norm.key_norm 128 s
final_layer.linear 128 w
final_layer.adaLN_modulation.1 2D w
""",
    ),
    "WanTransformer3DModel": Space(
        {"num_layers": 2},
        {"D": 5120, "F": 13824},
        _WAN,
        shapes={"head.modulation": (1, 2, 5), "blocks.0.modulation": (1, 6, 5)},
    ),
    "WanTransformer3DModel image to video": Space(
        {"num_layers": 2, "image_dim": 1280, "added_kv_proj_dim": 5120, "in_channels": 36},
        {"D": 5120, "F": 13824},
        _WAN
        + """
blocks.*.cross_attn.k_img D
blocks.*.cross_attn.v_img D
blocks.*.cross_attn.norm_k_img D w
img_emb.proj.0 1280
img_emb.proj.1 1280
img_emb.proj.3 D
img_emb.proj.4 D
""",
    ),
    "WanVACETransformer3DModel": Space(
        {"num_layers": 2, "vace_layers": [0]},
        {"D": 5120, "F": 13824},
        _WAN
        + _WAN.partition("head.modulation 1 -")[2].replace("blocks.*", "vace_blocks.*")
        + """
vace_patch_embedding D
vace_blocks.*.before_proj D
vace_blocks.*.after_proj D
""",
        blocks={"vace_blocks": range(1)},
    ),
    "ZImageTransformer2DModel": Space(
        {"n_layers": 2, "n_refiner_layers": 2},
        {"D": 3840, "F": 10240},
        """
x_embedder D
final_layer.linear 64
final_layer.adaLN_modulation.1 D
t_embedder.mlp.0 1024
t_embedder.mlp.2 256
cap_embedder.0 2560 w
cap_embedder.1 D
x_pad_token 1 -
cap_pad_token 1 -
layers.*.adaLN_modulation.0 4D
noise_refiner.*.adaLN_modulation.0 4D
norm_final D w
"""
        + "".join(
            _Z_BLOCK.format(block=block) for block in ("layers", "noise_refiner", "context_refiner")
        ),
        dropped=("norm_final.weight",),
    ),
    "SD3Transformer2DModel": Space(
        {"num_layers": 2, "dual_attention_layers": (0,), "qk_norm": "rms_norm"},
        {"D": 1152},
        """
pos_embed 1 -
x_embedder.proj D
t_embedder.mlp.0 D
t_embedder.mlp.2 D
y_embedder.mlp.0 D
y_embedder.mlp.2 D
context_embedder D
joint_blocks.0.x_block.adaLN_modulation.1 9D
joint_blocks.1.x_block.adaLN_modulation.1 6D
joint_blocks.0.context_block.adaLN_modulation.1 6D
joint_blocks.1.context_block.adaLN_modulation.1 2D
joint_blocks.0.x_block.attn2.qkv 3D
joint_blocks.0.x_block.attn2.ln_q 64 w
joint_blocks.0.x_block.attn2.ln_k 64 w
joint_blocks.0.x_block.attn2.proj D
final_layer.linear 64
final_layer.adaLN_modulation.1 2D
"""
        + "".join(_SD3_BLOCK.format(side=side) for side in ("x", "context"))
        + _SD3_REST.format(i=0, side="x")
        + _SD3_REST.format(i=1, side="x")
        + _SD3_REST.format(i=0, side="context"),
    ),
    "HunyuanVideoTransformer3DModel": Space(
        {"num_layers": 2, "num_single_layers": 2, "num_refiner_layers": 2},
        {"D": 3072},
        """
img_in.proj D
txt_in.input_embedder D
txt_in.t_embedder.mlp.0 D
txt_in.t_embedder.mlp.2 D
txt_in.c_embedder.linear_1 D
txt_in.c_embedder.linear_2 D
txt_in.individual_token_refiner.blocks.*.norm1 D
txt_in.individual_token_refiner.blocks.*.norm2 D
txt_in.individual_token_refiner.blocks.*.self_attn_qkv 3D
txt_in.individual_token_refiner.blocks.*.self_attn_proj D
txt_in.individual_token_refiner.blocks.*.mlp.fc1 4D
txt_in.individual_token_refiner.blocks.*.mlp.fc2 D
txt_in.individual_token_refiner.blocks.*.adaLN_modulation.1 2D
time_in.mlp.0 D
time_in.mlp.2 D
vector_in.in_layer D
vector_in.out_layer D
guidance_in.mlp.0 D
guidance_in.mlp.2 D
single_blocks.*.linear1 7D
single_blocks.*.linear2 D
single_blocks.*.q_norm 128 w
single_blocks.*.k_norm 128 w
single_blocks.*.modulation.linear 3D
final_layer.linear 64
final_layer.adaLN_modulation.1 2D
"""
        + "".join(_HUNYUAN_SIDE.format(side=side) for side in ("img", "txt")),
    ),
    "LTXVideoTransformer3DModel": Space(
        {"num_layers": 2},
        {"D": 2048},
        """
patchify_proj D
adaln_single.emb.timestep_embedder.linear_1 D
adaln_single.emb.timestep_embedder.linear_2 D
adaln_single.linear 6D
caption_projection.linear_1 D
caption_projection.linear_2 D
scale_shift_table 2 -
proj_out 128
transformer_blocks.*.scale_shift_table 6 -
transformer_blocks.*.ff.net.0.proj 4D
transformer_blocks.*.ff.net.2 D
"""
        + "".join(_LTX_ATTENTION.format(attn=attn) for attn in ("attn1", "attn2")),
    ),
}


_LUMINA_BLOCK = """
{block}.*.attention.qkv Q w
{block}.*.attention.out D w
{block}.*.attention.q_norm 96 w
{block}.*.attention.k_norm 96 w
{block}.*.attention_norm1 D w
{block}.*.attention_norm2 D w
{block}.*.ffn_norm1 D w
{block}.*.ffn_norm2 D w
{block}.*.feed_forward.w1 9216 w
{block}.*.feed_forward.w2 D w
{block}.*.feed_forward.w3 9216 w
"""
_AURA_FLOW = """
register_tokens 1 -
positional_encoding 1 -
init_x_linear D
cond_seq_linear D w
t_embedder.mlp.0 D
t_embedder.mlp.2 D
final_linear 16 w
modF.1 2D w
double_layers.*.modX.1 6D w
double_layers.*.modC.1 6D w
single_layers.*.modCX.1 6D w
"""
_MOCHI_SIDE = """
blocks.*.attn.qkv_{side} 3D w
blocks.*.attn.q_norm_{side} 128 w
blocks.*.attn.k_norm_{side} 128 w
"""
_LTX_2_BRANCH = """
{a}patchify_proj {D}
{a}adaln_single.emb.timestep_embedder.linear_1 {D}
{a}adaln_single.emb.timestep_embedder.linear_2 {D}
{a}adaln_single.linear 6{D}
{a}caption_projection.linear_1 {D}
{a}caption_projection.linear_2 {D}
{a}scale_shift_table 2 -
{a}proj_out 128
transformer_blocks.*.{a}scale_shift_table 6 -
transformer_blocks.*.scale_shift_table_a2v_ca_{kind} 5 -
transformer_blocks.*.{a}ff.net.0.proj 4{D}
transformer_blocks.*.{a}ff.net.2 {D}
"""
_LTX_2_ATTENTION = """
transformer_blocks.*.{attn}.to_q {D}
transformer_blocks.*.{attn}.to_k {D}
transformer_blocks.*.{attn}.to_v {D}
transformer_blocks.*.{attn}.to_out.0 {out}
transformer_blocks.*.{attn}.q_norm {D} w
transformer_blocks.*.{attn}.k_norm {D} w
"""
_LTX_2_GATE = """
av_ca_{gate}_adaln_single.emb.timestep_embedder.linear_1 {D}
av_ca_{gate}_adaln_single.emb.timestep_embedder.linear_2 {D}
av_ca_{gate}_adaln_single.linear {rows}
"""

MORE_SPACES = {
    "Lumina2Transformer2DModel": Space(
        {"num_layers": 2, "num_refiner_layers": 2},
        {"D": 2304, "Q": 3840},
        """
x_embedder D
t_embedder.mlp.0 1024
t_embedder.mlp.2 1024
cap_embedder.0 1024 w
cap_embedder.1 D
final_layer.linear 64
final_layer.adaLN_modulation.1 D
norm_final D w
layers.*.adaLN_modulation.1 9216
noise_refiner.*.adaLN_modulation.1 9216
"""
        + "".join(
            _LUMINA_BLOCK.format(block=block)
            for block in ("layers", "noise_refiner", "context_refiner")
        ),
        dropped=("norm_final.weight",),
    ),
    "AuraFlowTransformer2DModel": Space(
        {"num_mmdit_layers": 2, "num_single_dit_layers": 2},
        {"D": 3072},
        _AURA_FLOW
        + "".join(
            f"{block}.*.{mlp}.c_fc1 8192 w\n{block}.*.{mlp}.c_fc2 8192 w\n{block}.*.{mlp}.c_proj D w\n"
            for block, mlp in (
                *(("double_layers", "mlpX"), ("double_layers", "mlpC")),
                ("single_layers", "mlp"),
            )
        )
        + "".join(
            f"{block}.*.attn.w{number}{x} D w\n"
            for block, number in (("double_layers", 1), ("double_layers", 2), ("single_layers", 1))
            for x in "qkvo"
        ),
    ),
    "SanaTransformer2DModel": Space(
        {"num_layers": 2},
        {"D": 2240},
        """
pos_embed 1 -
x_embedder.proj D
t_embedder.mlp.0 D
t_embedder.mlp.2 D
t_block.1 6D
y_embedder.y_embedding 300 -
y_embedder.y_proj.fc1 D
y_embedder.y_proj.fc2 D
attention_y_norm D w
blocks.*.scale_shift_table 6 -
blocks.*.attn.qkv 3D w
blocks.*.attn.proj D
blocks.*.cross_attn.q_linear D
blocks.*.cross_attn.kv_linear 2D
blocks.*.cross_attn.proj D
blocks.*.mlp.inverted_conv.conv 5D
blocks.*.mlp.depth_conv.conv 5D
blocks.*.mlp.point_conv.conv D w
final_layer.linear 32
final_layer.scale_shift_table 2 -
""",
        dropped=("pos_embed", "y_embedder.y_embedding"),
    ),
    "Krea2Transformer2DModel": Space(
        {"num_layers": 2},
        {"D": 6144, "T": 2560},
        """
first D
tmlp.0 D
tmlp.2 D
tproj.1 6D
txtmlp.0 T s
txtmlp.1 D
txtmlp.3 D
txtfusion.projector 1 w
last.linear 64
last.norm D s
last.modulation.lin 2 -
"""
        + "".join(
            f"{block}.*.attn.wq {D} w\n{block}.*.attn.wk {kv} w\n{block}.*.attn.wv {kv} w\n"
            f"{block}.*.attn.wo {D} w\n{block}.*.attn.gate {D} w\n"
            f"{block}.*.attn.qknorm.qnorm 128 s\n{block}.*.attn.qknorm.knorm 128 s\n"
            f"{block}.*.mlp.gate {mlp} w\n{block}.*.mlp.up {mlp} w\n{block}.*.mlp.down {D} w\n"
            f"{block}.*.prenorm {D} s\n{block}.*.postnorm {D} s\n"
            for block, D, kv, mlp in (
                ("blocks", "D", "1536", "16384"),
                ("txtfusion.layerwise_blocks", "T", "T", "6912"),
                ("txtfusion.refiner_blocks", "T", "T", "6912"),
            )
        )
        + "blocks.*.mod.lin 36864 -\n",
        shapes={f"blocks.{i}.mod.lin": (36864,) for i in range(2)},
    ),
    "MochiTransformer3DModel": Space(
        {"num_layers": 48},
        {"D": 3072, "T": 1536},
        """
pos_frequencies 3 -
x_embedder.proj D
t_embedder.mlp.0 D
t_embedder.mlp.2 D
t5_y_embedder.to_kv 8192
t5_y_embedder.to_q 4096
t5_y_embedder.to_out D
t5_yproj T
blocks.*.mod_x 4D
blocks.*.mod_y 4T
blocks.47.mod_y T
blocks.*.attn.proj_x D
blocks.*.attn.proj_y T
blocks.*.mlp_x.w1 16384 w
blocks.*.mlp_x.w2 D w
blocks.*.mlp_y.w1 8192 w
blocks.*.mlp_y.w2 T w
final_layer.mod 2D
final_layer.linear 48
"""
        + "".join(_MOCHI_SIDE.format(side=side) for side in "xy"),
        blocks={
            **dict.fromkeys(
                ("blocks.*.mod_y", "blocks.*.attn.proj_y", "blocks.*.mlp_y"), range(47)
            ),
            "blocks.*": range(48),
        },
    ),
    "LTX2VideoTransformer3DModel": Space(
        {"num_layers": 2},
        {"D": 4096, "A": 2048},
        _LTX_2_BRANCH.format(a="", D="D", kind="video")
        + _LTX_2_BRANCH.format(a="audio_", D="A", kind="audio")
        + "".join(
            _LTX_2_ATTENTION.format(attn=attn, D=D, out=out)
            for attn, D, out in (
                *(("attn1", "D", "D"), ("attn2", "D", "D")),
                *(("audio_attn1", "A", "A"), ("audio_attn2", "A", "A")),
                *(("audio_to_video_attn", "A", "D"), ("video_to_audio_attn", "A", "A")),
            )
        )
        + "".join(
            _LTX_2_GATE.format(gate=gate, D=D, rows=rows)
            for gate, D, rows in (
                ("video_scale_shift", "D", "4D"),
                ("audio_scale_shift", "A", "4A"),
                ("a2v_gate", "D", "D"),
                ("v2a_gate", "A", "A"),
            )
        ),
    ),
}
"""Models that are further from those of the matrix."""
