package streamapp.bench;

import java.util.concurrent.CountDownLatch;
import java.util.concurrent.atomic.AtomicLong;

/** Counts the events of all threads, says so on stdout now and then, and opens a latch when all are done. */
final class Progress {

    private static final long EVERY = 5_000;

    private final AtomicLong done = new AtomicLong();
    private final long wanted;
    private final CountDownLatch end;

    Progress(long wanted, CountDownLatch end) {
        this.wanted = wanted;
        this.end = end;
    }

    void one() {
        long count = done.incrementAndGet();
        if (count % EVERY == 0 || count == wanted) {
            say();
        }
        if (count == wanted) {
            end.countDown();
        }
    }

    /** In turn, and the latest count: a line never says less than the one before. */
    private synchronized void say() {
        System.out.println("progress " + done.get());
        System.out.flush();
    }

    long done() {
        return done.get();
    }
}
