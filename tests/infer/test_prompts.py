from nanollama_jax.commands.generate import read_prompts


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffone\ntwo\ufeff\n".encode())
    assert read_prompts(path) == ["one", "two\ufeff"]
    path = tmp_path / "prompts.jsonl"
    path.write_bytes('\ufeff{"prompt": "one"}\n'.encode())
    assert read_prompts(path) == ["one"]
    path.write_bytes(b'{"prompt": "one"}\n')
    assert read_prompts(path) == ["one"]
