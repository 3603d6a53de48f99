from llmcompress.show import kept_table


def site(block, role, stored, spec, dense=100):
    return {"name": f"{block}.{role}", "block": block, "role": role, "stored_values": stored, "dense_values": dense,
            "spec": spec}  # fmt: skip


def test_kept_shares_by_what_shares_factors_and_by_depth():
    sites = []
    for block in range(3):
        shared = {"shared": {"A": f"{block}.q"}}
        sites += [site(block, "q", 90, {}), site(block, "k", 30, shared), site(block, "down", 20 + 10 * block, {})]
    sites += [{**site(0, role, 100, None), "name": f"other.{role}"} for role in ("q", "k")]
    table = kept_table(sites)
    found = [[str(cell) for cell in column.cells] for column in table.columns]
    assert found == [
        ["q k", "down"],
        ["80.0%", "20.0%"],  # (90 + 30 + 100 + 100) / 400
        ["60.0%", "30.0%"],
        ["60.0%", "40.0%"],
        ["70.0%", "30.0%"],
        ["2 of 8", "0 of 3"],
    ]
