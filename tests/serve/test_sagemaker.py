"""The SageMaker example of docs/serving.md, run against botocore's stand-in for the service.

The stand-in checks each request by AWS' description of the service, and that there is no other.
"""

import io
import json
import re

import boto3
import pytest
from botocore.exceptions import WaiterError
from botocore.response import StreamingBody
from botocore.stub import ANY, Stubber
from paths import ROOT

PAGE = (ROOT / "docs/serving.md").read_text()
SECTION = PAGE.split("\n## Amazon SageMaker\n")[1].split("\n## ")[0]
SETTINGS, PLAIN, SPECULATORS, START, REQUEST, DELETE = re.findall(
    r"```python\n(.*?)```", SECTION, re.DOTALL
)
NAME = "qwen3-peagle"
S3, HUB = "s3://BUCKET/qwen3-peagle/", "USER/DRAFTER"


@pytest.fixture
def clients(monkeypatch):
    """Stubbed clients in the place of those that the page makes."""
    keys = {"aws_access_key_id": "x", "aws_secret_access_key": "x", "region_name": "us-east-1"}
    made = {name: boto3.client(name, **keys) for name in ("sagemaker", "sagemaker-runtime")}
    stubs = {name: Stubber(client) for name, client in made.items()}
    for stub in stubs.values():
        stub.activate()
    monkeypatch.setattr(boto3, "client", lambda service, region_name: made[service])
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between a waiter's questions
    yield stubs
    for client in made.values():
        client.close()


def expect_start(stub, container):
    arn = "arn:aws:sagemaker:us-east-1:000000000000:"
    role = "arn:aws:iam::ACCOUNT:role/ROLE"
    wanted = {"ModelName": NAME, "ExecutionRoleArn": role, "PrimaryContainer": container}
    stub.add_response("create_model", {"ModelArn": f"{arn}model/{NAME}"}, wanted)
    wanted = {"EndpointConfigName": NAME, "ProductionVariants": ANY}
    answer = {"EndpointConfigArn": f"{arn}endpoint-config/{NAME}"}
    stub.add_response("create_endpoint_config", answer, wanted)
    wanted = {"EndpointName": NAME, "EndpointConfigName": NAME}
    stub.add_response("create_endpoint", {"EndpointArn": f"{arn}endpoint/{NAME}"}, wanted)


def expect_status(stub, *statuses):
    for status in statuses:
        answer = {
            "EndpointName": NAME, "EndpointConfigName": NAME, "EndpointStatus": status,
            "EndpointArn": f"arn:aws:sagemaker:us-east-1:000000000000:endpoint/{NAME}",
            "CreationTime": 0, "LastModifiedTime": 0,
        }  # fmt: skip
        stub.add_response("describe_endpoint", answer, {"EndpointName": NAME})


def expect_deletion(stub):
    stub.add_response("delete_endpoint", {}, {"EndpointName": NAME})
    stub.add_response("delete_endpoint_config", {}, {"EndpointConfigName": NAME})
    stub.add_response("delete_model", {}, {"ModelName": NAME})
    expect_status(stub, "Deleting")
    gone = {"expected_params": {"EndpointName": NAME}}
    stub.add_client_error("describe_endpoint", "ValidationException", "not found", **gone)


SETTING = {"method": "eagle3", "num_speculative_tokens": 5, "parallel_drafting": True}


@pytest.mark.parametrize("drafter", [S3, HUB])
@pytest.mark.parametrize("layout", ["eagle3", "speculators"])
def test_the_page_starts_asks_and_deletes_an_endpoint(clients, capsys, layout, drafter):
    place = "/opt/ml/model" if drafter == S3 else HUB
    environment = {"SM_VLLM_SERVED_MODEL_NAME": NAME, "VLLM_USE_V2_MODEL_RUNNER": "0"}
    if layout == "eagle3":
        environment["SM_VLLM_MODEL"] = "Qwen/Qwen3-0.6B"
        environment["SM_VLLM_SPECULATIVE_CONFIG"] = SameJson(SETTING | {"model": place})
    else:
        environment["SM_VLLM_MODEL"] = place
    container = {"Image": "IMAGE", "Environment": environment}
    if drafter == S3:
        source = {"S3Uri": S3, "S3DataType": "S3Prefix", "CompressionType": "None"}
        container["ModelDataSource"] = {"S3DataSource": source}
    service, runtime = clients["sagemaker"], clients["sagemaker-runtime"]
    expect_start(service, container)
    expect_status(service, "Creating", "InService")
    said = json.dumps({"choices": [{"message": {"content": "It guesses ahead."}}]}).encode()
    question = SameJson({"model": NAME, "messages": ANY, "max_tokens": 128})
    runtime.add_response(
        "invoke_endpoint",
        {"Body": StreamingBody(io.BytesIO(said), len(said))},
        {"EndpointName": NAME, "ContentType": "application/json", "Body": question},
    )
    expect_deletion(service)

    assert f'drafter = "{S3}"' in SETTINGS
    blocks = [SETTINGS.replace(f'"{S3}"', f'"{drafter}"', 1)]
    blocks += [PLAIN if layout == "eagle3" else SPECULATORS, START, REQUEST, DELETE]
    exec("\n".join(blocks), {})
    assert capsys.readouterr().out == "It guesses ahead.\n"
    for stub in clients.values():
        stub.assert_no_pending_responses()


def test_an_endpoint_that_fails_to_start_is_said_and_can_be_deleted(clients):
    service, names = clients["sagemaker"], {}
    expect_start(service, ANY)
    expect_status(service, "Creating", "Failed")
    with pytest.raises(WaiterError, match="terminal failure"):
        exec("\n".join([SETTINGS, SPECULATORS, START]), names)
    expect_deletion(service)
    exec(DELETE, names)
    service.assert_no_pending_responses()


class SameJson:
    """Equal to any text that holds this JSON document."""

    def __init__(self, document):
        self.document = document

    def __eq__(self, text):
        return json.loads(text) == self.document

    def __repr__(self):
        return f"SameJson({self.document})"
