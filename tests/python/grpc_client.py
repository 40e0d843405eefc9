"""A gRPC client that is generated from the mesh's proto files by somebody else's tools.

grpc_client.py PROTO_FOLDER ADDRESS publish-stream TOPIC COUNT KEYS SIZE
    publishes COUNT JSON records {"k", "n", "pad"} of about SIZE bytes in a pipeline, and prints what was acknowledged
grpc_client.py PROTO_FOLDER ADDRESS attach ROUTE COUNT
    attaches to a route, answers each delivery with a reply that adds {"by": "python"}, and ends after COUNT records
"""

import importlib
import json
import os
import queue
import sys
import tempfile

import grpc
from grpc_tools import protoc


def generate(folder):
    out = tempfile.mkdtemp(prefix="mesh-grpc-")
    names = [f"mesh/v1/{name}.proto" for name in ("record", "mesh", "handler", "control")]
    if protoc.main(["protoc", f"-I{folder}", f"--python_out={out}", f"--grpc_python_out={out}", *names]) != 0:
        sys.exit("protoc failed")
    sys.path.insert(0, out)
    return [importlib.import_module(f"mesh.v1.{name}") for name in ("record_pb2", "mesh_pb2", "mesh_pb2_grpc")]


def publish_stream(stub, record_pb2, mesh_pb2, topic, count, keys, size):
    batch = 50

    def requests():
        for sequence, start in enumerate(range(0, count, batch)):
            records = []
            for index in range(start, min(start + batch, count)):
                key, number = index % keys, index // keys
                value = json.dumps({"k": f"k{key}", "n": number, "pad": ""})
                value = value[:-2] + "x" * max(0, size - len(value)) + value[-2:]
                records.append(record_pb2.Record(key=f"k{key}".encode(), value=value.encode(), content_type="application/json"))
            yield mesh_pb2.PublishStreamRequest(sequence=sequence, topic=topic if sequence == 0 else "", records=records)

    acknowledged, failed, expected = 0, [], 0
    for response in stub.PublishStream(requests()):
        for result in response.results:
            if result.sequence != expected:
                sys.exit(f"sequence {result.sequence} was answered where {expected} was due")
            expected += 1
            for one in result.results:
                if one.WhichOneof("result") == "position":
                    acknowledged += 1
                else:
                    failed.append(one.problem.code)
    print(json.dumps({"acknowledged": acknowledged, "failed": failed[:10]}))


def attach(stub, record_pb2, mesh_pb2, route, count):
    outgoing = queue.Queue(1000)
    outgoing.put(mesh_pb2.SubscribeRequest(attach=mesh_pb2.Attach(route=route, credits=16)))
    answered = 0
    call = stub.Subscribe(iter(outgoing.get, None))
    for response in call:
        if response.WhichOneof("response") == "attached":
            print("READY 0", flush=True)
        if response.WhichOneof("response") != "delivery":
            continue
        outcomes = record_pb2.Outcomes()
        for delivered in response.delivery.records:
            value = {**json.loads(delivered.record.value), "by": "python"}
            outcome = outcomes.outcomes.add(delivery_id=delivered.delivery_id)
            outcome.reply.records.add(value=json.dumps(value).encode())
            answered += 1
        outgoing.put(mesh_pb2.SubscribeRequest(outcomes=outcomes))
        outgoing.put(mesh_pb2.SubscribeRequest(credit=mesh_pb2.Credit(records=len(response.delivery.records))))
        if answered >= count:
            outgoing.put(None)
    if answered < count:
        sys.exit(f"only {answered} of {count} deliveries came")
    try:
        print(json.dumps({"answered": answered}), flush=True)
    except BrokenPipeError:
        # Who waited for READY does not listen any more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    folder, address, command, *rest = sys.argv[1:]
    records, mesh, mesh_grpc = generate(folder)
    with grpc.insecure_channel(address) as channel:
        client = mesh_grpc.MeshStub(channel)
        if command == "publish-stream":
            publish_stream(client, records, mesh, rest[0], *map(int, rest[1:]))
        else:
            attach(client, records, mesh, rest[0], int(rest[1]))
