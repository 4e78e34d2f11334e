package streamapp.bench;

import java.io.File;
import java.time.Duration;
import java.util.HashMap;
import java.util.Map;
import java.util.Properties;
import java.util.Set;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.atomic.AtomicReference;
import org.apache.kafka.clients.producer.ProducerConfig;
import org.apache.kafka.common.serialization.Serdes;
import org.apache.kafka.streams.KafkaStreams;
import org.apache.kafka.streams.StreamsBuilder;
import org.apache.kafka.streams.StreamsConfig;
import org.apache.kafka.streams.Topology;
import org.apache.kafka.streams.errors.StreamsUncaughtExceptionHandler.StreamThreadExceptionResponse;
import org.apache.kafka.streams.kstream.Consumed;
import org.apache.kafka.streams.kstream.Produced;
import org.apache.kafka.streams.processor.api.Processor;
import org.apache.kafka.streams.processor.api.ProcessorSupplier;
import org.apache.kafka.streams.state.StoreBuilder;
import org.apache.kafka.streams.state.Stores;

/**
 * The benchmark's work as a Kafka Streams application, written as its documentation would have it.
 *
 * <p>Decided here: the topology, the settings, and when the program ends. A store of profiles by user in RocksDB
 * with the changelog topic that it has by default; a processor reads, folds and writes one profile per event and
 * forwards transitions, whose status names their topic.
 */
public final class App {

    private static final String HELP = """
            Decayed label weights per user, segments entered and left, by Kafka Streams; part of `make bench`.

              --bootstrap=HOST:PORT  Kafka
              --topic=T              events, JSON, key user_id; read from the earliest offset
              --entered=T --exited=T where transitions go; all three topics must exist
              --definitions=FILE     segments as JSON
              --group=G              application id, so also the consumer group
              --events=N             end after so many
              --state-dir=DIR        for RocksDB
              --threads=N            stream threads (default 2)
              --cache-mb=N           record caches of all threads together (default 64); 0: no caching
            """;

    private static final Set<String> OPTIONS = Set.of(
            "bootstrap", "topic", "entered", "exited", "definitions", "group", "events", "state-dir", "threads",
            "cache-mb");
    private static final Duration CLOSE_DEADLINE = Duration.ofSeconds(60);

    private App() {}

    public static void main(String[] arguments) throws Exception {
        Map<String, String> options = options(arguments);
        Definitions definitions = Definitions.read(new File(option(options, "definitions")));
        long wanted = Long.parseLong(option(options, "events"));
        CountDownLatch end = new CountDownLatch(1);
        CountDownLatch closed = new CountDownLatch(1);
        Progress progress = new Progress(wanted, end);
        AtomicReference<Throwable> failure = new AtomicReference<>();

        KafkaStreams streams = new KafkaStreams(topology(options, definitions, progress), settings(options));
        streams.setUncaughtExceptionHandler(exception -> {
            failure.set(exception);
            end.countDown();
            return StreamThreadExceptionResponse.SHUTDOWN_CLIENT;
        });
        Thread onSignal = new Thread(() -> {
            end.countDown();
            try {
                closed.await();
            } catch (InterruptedException exception) {
                Thread.currentThread().interrupt();
            }
        });
        Runtime.getRuntime().addShutdownHook(onSignal);
        streams.start();
        end.await();
        // Closing commits: what was said is acknowledged by Kafka, and the caches are in the store and the changelog.
        boolean isClosed = streams.close(CLOSE_DEADLINE);
        boolean isDone = failure.get() == null && isClosed && progress.done() >= wanted;
        if (failure.get() != null) {
            failure.get().printStackTrace();
        } else if (!isClosed) {
            System.err.println("did not close within " + CLOSE_DEADLINE.toSeconds() + " s");
        } else if (isDone) {
            System.out.println("did " + wanted + " events");
        } else {
            System.err.println("ended by a signal after " + progress.done() + " of " + wanted + " events");
        }
        System.out.flush();
        closed.countDown();
        System.exit(isDone ? 0 : 1);
    }

    private static Topology topology(Map<String, String> options, Definitions definitions, Progress progress) {
        String entered = option(options, "entered");
        String exited = option(options, "exited");
        StoreBuilder<?> store = store(cacheBytes(options) > 0);
        StreamsBuilder builder = new StreamsBuilder();
        builder.stream(option(options, "topic"), Consumed.with(Serdes.String(), new JsonSerde<>(Event.class)))
                .process(new ProcessorSupplier<String, Event, String, Transition>() {
                    @Override
                    public Processor<String, Event, String, Transition> get() {
                        return new SegmentProcessor(definitions, progress);
                    }

                    @Override
                    public Set<StoreBuilder<?>> stores() {
                        return Set.of(store);
                    }
                })
                .to(
                        (user, transition, context) ->
                                transition.status().equals(Transition.ENTERED) ? entered : exited,
                        Produced.with(Serdes.String(), new JsonSerde<>(Transition.class)));
        return builder.build();
    }

    private static StoreBuilder<?> store(boolean isCached) {
        StoreBuilder<?> store = Stores.keyValueStoreBuilder(
                Stores.persistentKeyValueStore(SegmentProcessor.STORE), Serdes.String(), new ProfileSerde());
        // The DSL caches by default, a store made by hand only when asked: a user's later events of the same commit
        // interval then need neither RocksDB nor the changelog topic, which halves the CPU that an event costs. The
        // changelog is on, as it is by default.
        return isCached ? store.withCachingEnabled() : store;
    }

    private static Properties settings(Map<String, String> options) {
        Properties settings = new Properties();
        settings.put(StreamsConfig.APPLICATION_ID_CONFIG, option(options, "group"));
        settings.put(StreamsConfig.BOOTSTRAP_SERVERS_CONFIG, option(options, "bootstrap"));
        settings.put(StreamsConfig.STATE_DIR_CONFIG, option(options, "state-dir"));
        settings.put(StreamsConfig.NUM_STREAM_THREADS_CONFIG, options.getOrDefault("threads", "2"));
        // The broker of the benchmark has no second node for the changelog topic.
        settings.put(StreamsConfig.REPLICATION_FACTOR_CONFIG, 1);
        // The default of 10 MB does not hold the profiles of 20,000 users, and what does not fit is written at once.
        settings.put(StreamsConfig.STATESTORE_CACHE_MAX_BYTES_CONFIG, cacheBytes(options));
        // Kafka Streams lingers 100 ms already; batches must be larger than the 16 kB of the plain producer to gain
        // by it. All else is the default: at-least-once, a commit every 30 s, no compression.
        settings.put(StreamsConfig.producerPrefix(ProducerConfig.BATCH_SIZE_CONFIG), 256 * 1024);
        return settings;
    }

    private static long cacheBytes(Map<String, String> options) {
        return Long.parseLong(options.getOrDefault("cache-mb", "64")) * 1024 * 1024;
    }

    private static Map<String, String> options(String[] arguments) {
        Map<String, String> options = new HashMap<>();
        for (String argument : arguments) {
            if (argument.equals("--help")) {
                System.out.print(HELP);
                System.exit(0);
            }
            int equals = argument.indexOf('=');
            String name = argument.startsWith("--") && equals > 2 ? argument.substring(2, equals) : "";
            if (!OPTIONS.contains(name)) {
                fail("expected options as --name=value (see --help), got " + argument);
            }
            options.put(name, argument.substring(equals + 1));
        }
        return options;
    }

    private static String option(Map<String, String> options, String name) {
        String value = options.get(name);
        if (value == null) {
            fail("expected an option --" + name + "=...; see --help");
        }
        return value;
    }

    private static void fail(String message) {
        System.err.println(message);
        System.exit(2);
    }
}
