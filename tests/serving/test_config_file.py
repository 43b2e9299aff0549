"""What a config file sets, without a server."""

from __future__ import annotations

from tsqp_shm.cli.config_file import apply_config
from tsqp_shm.cli.verbs import build_parser


def test_one_key_is_one_key_and_what_was_given_wins_also_where_it_is_zero(tmp_path):
    config = tmp_path / "serve.yaml"
    config.write_text("api-key: secret\nallowed-origins: [https://a.example]\nport: 8080\nmax-queue: 7\n")
    arguments = build_parser().parse_args(["serve", "--port", "0", "--config", str(config)])
    apply_config(config, arguments)
    assert (arguments.api_keys, arguments.allowed_origins) == (["secret"], ["https://a.example"])
    assert (arguments.port, arguments.max_queue) == (0, 7)
