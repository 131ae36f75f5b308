"""disable_conv2d_quant: what the graph computed beside rounding stays."""

from __future__ import annotations

from pass_graphs import editable, graph_text, normal, outputs_of, relative_error, run_pass, seeded_inputs


def test_a_bound_that_integer_codes_imply_stays_where_a_convolution_is_no_longer_quantized() -> None:
    """onnxruntime's quantizer leaves out a Relu in front of codes that stand for nothing below zero."""
    proto = graph_text(
        """
        g (float[1,3,8,8] x) => (float[1,4,4,4] y) <float scale = {0.02}, uint8 zero = {0}> {
          h = Conv<pads = [1, 1, 1, 1]>(x, w)
          codes = QuantizeLinear(h, scale, zero)
          bounded = DequantizeLinear(codes, scale, zero)
          y = Conv<strides = [2, 2], kernel_shape = [2, 2]>(bounded, v)
        }""",
        {"w": normal(1, 4, 3, 3, 3), "v": normal(2, 4, 4, 2, 2)},
    )
    model = editable(proto)
    run_pass(model, "disable_conv2d_quant")
    assert [node.op for node in model.graph.nodes] == ["Conv", "Clip", "Conv"]
    inputs = seeded_inputs(proto)
    assert relative_error(outputs_of(model, inputs), outputs_of(proto, inputs)) < 0.02
