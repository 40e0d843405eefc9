"""Kafka by clients that are not the mesh's own: kafka-python and confluent-kafka.

create   --topic T --partitions N                       makes a topic
produce  --topic T [--library kafka-python|confluent]   one JSON object a line on stdin: {"key": text?, "value": text, "headers": [[n, text]]?}
                                                        prints {"produced": n} once every record is acknowledged
consume  --topic T [--library …] [--mode records|summary] [--read-committed]
                                                        reads every partition from its start to the end that it has now, then ends
                                                        records: one JSON object a line; summary: one object, see `summary`
delete   --topic T --before N                            deletes the records before an offset, in every partition
committed --group G --topic T                           prints the group's committed offsets
"""

import argparse
import base64
import json
import sys
import time


def parse():
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["create", "delete", "produce", "consume", "committed"])
    parser.add_argument("--bootstrap", required=True)
    parser.add_argument("--topic", required=True)
    parser.add_argument("--partitions", type=int, default=4)
    parser.add_argument("--before", type=int)
    parser.add_argument("--library", choices=["kafka-python", "confluent"], default="kafka-python")
    parser.add_argument("--mode", choices=["records", "summary"], default="records")
    parser.add_argument("--read-committed", action="store_true")
    parser.add_argument("--group")
    parser.add_argument("--timeout", type=float, default=60)
    return parser.parse_args()


def create(arguments):
    from confluent_kafka.admin import AdminClient, NewTopic

    admin = AdminClient({"bootstrap.servers": arguments.bootstrap})
    for future in admin.create_topics([NewTopic(arguments.topic, arguments.partitions, 1)]).values():
        future.result(arguments.timeout)
    print(json.dumps({"created": arguments.topic}))


def delete(arguments):
    from confluent_kafka import Consumer, TopicPartition
    from confluent_kafka.admin import AdminClient

    consumer = Consumer({"bootstrap.servers": arguments.bootstrap, "group.id": "unused"})
    targets = []
    for partition in consumer.list_topics(arguments.topic, timeout=arguments.timeout).topics[arguments.topic].partitions:
        _, end = consumer.get_watermark_offsets(TopicPartition(arguments.topic, partition), timeout=arguments.timeout)
        targets.append(TopicPartition(arguments.topic, partition, min(arguments.before, end)))
    consumer.close()
    admin = AdminClient({"bootstrap.servers": arguments.bootstrap})
    for future in admin.delete_records(targets).values():
        future.result(arguments.timeout)
    print(json.dumps({"deleted_before": arguments.before}))


def lines():
    for line in sys.stdin:
        if line.strip():
            record = json.loads(line)
            key = record.get("key")
            headers = [(name, value.encode()) for name, value in record.get("headers", [])]
            yield None if key is None else key.encode(), record["value"].encode(), headers


def produce(arguments):
    count = 0
    if arguments.library == "kafka-python":
        from kafka import KafkaProducer

        producer = KafkaProducer(bootstrap_servers=arguments.bootstrap, acks="all")
        futures = []
        for key, value, headers in lines():
            futures.append(producer.send(arguments.topic, value=value, key=key, headers=headers))
            if len(futures) >= 5000:
                for future in futures:
                    future.get(arguments.timeout)
                count, futures = count + len(futures), []
        for future in futures:
            future.get(arguments.timeout)
        count += len(futures)
        producer.close()
    else:
        from confluent_kafka import Producer

        producer = Producer({"bootstrap.servers": arguments.bootstrap, "acks": "all", "partitioner": "murmur2_random"})
        failed = []

        def report(error, _message):
            nonlocal count
            if error is None:
                count += 1
            else:
                failed.append(str(error))

        for key, value, headers in lines():
            while True:
                try:
                    producer.produce(arguments.topic, value, key, headers=headers, on_delivery=report)
                    break
                except BufferError:
                    producer.poll(0.1)
            producer.poll(0)
        if producer.flush(arguments.timeout) or failed:
            sys.exit(f"not acknowledged: {failed[:3]}")
    print(json.dumps({"produced": count}))


def read_kafka_python(arguments):
    from kafka import KafkaConsumer, TopicPartition

    consumer = KafkaConsumer(
        bootstrap_servers=arguments.bootstrap,
        group_id=None,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        isolation_level="read_committed" if arguments.read_committed else "read_uncommitted",
    )
    partitions = [TopicPartition(arguments.topic, p) for p in sorted(consumer.partitions_for_topic(arguments.topic) or ())]
    if not partitions:
        sys.exit(f"there is no topic {arguments.topic}")
    consumer.assign(partitions)
    ends = consumer.end_offsets(partitions)
    consumer.seek_to_beginning(*partitions)
    while any(consumer.position(p) < ends[p] for p in partitions):
        for partition, records in consumer.poll(timeout_ms=500).items():
            for record in records:
                if record.offset < ends[partition]:
                    yield record.partition, record.offset, record.timestamp, record.key, record.value, record.headers or []
    consumer.close()


def read_confluent(arguments):
    from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, TopicPartition

    def open_consumer(isolation):
        return Consumer(
            {
                "bootstrap.servers": arguments.bootstrap,
                "group.id": "unused",
                "enable.auto.commit": False,
                "enable.partition.eof": True,
                "isolation.level": isolation,
            }
        )

    # The end that counts is the one of all records. Kafka answers a commit before it marks the partitions: a reader of committed records that
    # comes right then finds an earlier end, and has to wait.
    every = open_consumer("read_uncommitted")
    metadata = every.list_topics(arguments.topic, timeout=arguments.timeout).topics[arguments.topic]
    if metadata.error is not None:
        sys.exit(f"there is no topic {arguments.topic}: {metadata.error}")
    ends = {p: every.get_watermark_offsets(TopicPartition(arguments.topic, p), timeout=arguments.timeout)[1] for p in metadata.partitions}
    every.close()
    consumer = open_consumer("read_committed" if arguments.read_committed else "read_uncommitted")
    open_partitions = set(ends)
    consumer.assign([TopicPartition(arguments.topic, p, OFFSET_BEGINNING) for p in open_partitions])
    quiet_since = time.monotonic()
    while open_partitions:
        messages = consumer.consume(1000, 0.5)
        if messages:
            quiet_since = time.monotonic()
        elif time.monotonic() > quiet_since + arguments.timeout:
            sys.exit(f"{arguments.topic}: nothing came for {arguments.timeout} s before the end of partitions {sorted(open_partitions)}")
        for message in messages:
            if message.error() is None:
                yield message.partition(), message.offset(), message.timestamp()[1], message.key(), message.value(), message.headers() or []
            elif message.error().code() == KafkaError._PARTITION_EOF:
                if message.offset() >= ends[message.partition()]:
                    open_partitions.discard(message.partition())
            else:
                raise KafkaException(message.error())
    consumer.close()


def consume(arguments):
    read = read_kafka_python if arguments.library == "kafka-python" else read_confluent
    if arguments.mode == "summary":
        print(json.dumps(summary(read(arguments))))
        return
    for partition, offset, timestamp, key, value, headers in read(arguments):
        print(
            json.dumps(
                {
                    "partition": partition,
                    "offset": offset,
                    "timestamp": timestamp,
                    "key": None if key is None else base64.b64encode(key).decode(),
                    "value": None if value is None else base64.b64encode(value).decode(),
                    "headers": [[name, None if v is None else base64.b64encode(v).decode()] for name, v in headers],
                }
            )
        )


def summary(records):
    """Counts records and judges order. Values are JSON objects with `n`, a number that grows within a key; a repeated `mesh-id` is a
    duplicate, and order is judged by the first appearance of each."""
    count = duplicates = disorder = without_id = 0
    seen, last, homes, examples = set(), {}, {}, []
    numbers = set()
    for partition, offset, _timestamp, key, value, headers in records:
        count += 1
        identity = dict(headers).get("mesh-id")
        if identity is None:
            without_id += 1
        elif identity in seen:
            duplicates += 1
            continue
        seen.add(identity)
        number = json.loads(value)["n"]
        numbers.add((key, number))
        if homes.setdefault(key, partition) != partition or last.get(key, -1) >= number:
            disorder += 1
            if len(examples) < 5:
                examples.append(f"key {key!r}: {number} at {partition}/{offset} after {last.get(key)} at partition {homes[key]}")
        last[key] = number
    return {
        "count": count,
        "distinct": len(seen),
        "distinct_numbers": len(numbers),
        "duplicates": duplicates,
        "without_id": without_id,
        "keys": len(last),
        "disorder": disorder,
        "examples": examples,
    }


def committed(arguments):
    from confluent_kafka import Consumer, TopicPartition

    consumer = Consumer({"bootstrap.servers": arguments.bootstrap, "group.id": arguments.group, "enable.auto.commit": False})
    partitions = consumer.list_topics(arguments.topic, timeout=arguments.timeout).topics[arguments.topic].partitions
    offsets = consumer.committed([TopicPartition(arguments.topic, p) for p in partitions], timeout=arguments.timeout)
    print(json.dumps({str(p.partition): p.offset if p.offset >= 0 else None for p in offsets}))
    consumer.close()


if __name__ == "__main__":
    parsed = parse()
    {"create": create, "delete": delete, "produce": produce, "consume": consume, "committed": committed}[parsed.command](parsed)
