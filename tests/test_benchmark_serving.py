"""benchmarks/serving.py on a small random model: it asks a real server, and sees a wrong answer."""

import asyncio
import json

import httpx
import pytest
import serving

from modeling_snn_bert import SNNBertForSequenceClassification


@pytest.fixture
def arguments(make_config, tokenizer, texts, tmp_path):
    SNNBertForSequenceClassification(make_config()).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "texts.txt").write_text("\n".join(texts * 5), encoding="utf-8")
    return ["--model_name_or_path", str(tmp_path / "model"), "--data_file", str(tmp_path / "texts.txt")]


@pytest.mark.slow
def test_serving(arguments, tmp_path, capsys):
    out = tmp_path / "new" / "serving.json"
    options = ["--clients", "1", "4", "--texts_per_request", "1", "3", "--batch_size", "4", "--threads", "1"]
    serving.main([*arguments, *options, "--output_file", str(out)])
    results = json.loads(out.read_text())
    [table] = results["tables"]
    assert len(table["rows"]) == 2 + 4 and results["environment"]["threads"] == 1
    printed = capsys.readouterr().out
    assert all(row["texts_per_second"] > 0 and row["what"] in printed for row in table["rows"])
    assert "30 texts" in printed and "all answers came" in printed
    assert all(0 < row["median_milliseconds"] <= row["p95_milliseconds"] for row in table["rows"][2:])


@pytest.mark.parametrize(
    ("scores", "status", "message"), [([0.6, 0.4], 200, "1.0e-01 from"), ([0.5, 0.5], 503, "got 503")]
)
def test_a_wrong_answer_ends_it(monkeypatch, scores, status, message):
    class Session:
        def __init__(self, **settings):
            pass

        async def __aenter__(self):
            return self

        async def __aexit__(self, *exception):
            pass

        async def get(self, path):
            pass

        async def post(self, path, json):
            answers = [{"scores": dict(enumerate(scores))} for _ in json["texts"]]
            return httpx.Response(status, json={"predictions": answers})

    monkeypatch.setattr(serving.httpx, "AsyncClient", Session)
    with pytest.raises(SystemExit, match=message):
        asyncio.run(serving.under_load("http://a", ["a", "b"], [[0.5, 0.5]] * 2, 1, 1))
