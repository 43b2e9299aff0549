/* The doorbell of native/border/ring.h and tsqp_shm/shm/doorbell.py (adaptive): two rings, two parked words, two sockets.
 *
 * Memory is weaker than any machine this runs on: each process's stores wait in a buffer and reach the other side in any
 * order, except that two stores to one word keep theirs, that a release store waits for the ones before it, and that a
 * sequentially consistent fence waits for all. Each word has one writer, so a load looks at memory alone.
 *
 * There is no timeout: a sleeper is woken by a message or never. README.md says what is checked, and what the mutations
 * (-D...) show.
 */

#ifndef RECORDS
#define RECORDS 3 /* submitted, and answered one by one */
#endif
#ifndef DEPTH
#define DEPTH 2 /* of a ring, and how many are unanswered at most */
#endif
#define MESSAGES 4 /* a socket's queue */
#define STORES 6   /* a store buffer */

#define TEE 0
#define GPU 1
#define OTHER (1 - me)

mtype = { record_word, tail_word, head_word, parked_word };

/* Side i writes ring i, reads ring 1 - i, and parks at its own word. */
byte record[2 * DEPTH];
byte tail[2];
byte head[2]; /* head[i] is written by the reader of ring i */
byte parked[2];
chan buffer[2] = [STORES] of { mtype, byte, byte }; /* word, index in it, value */
chan socket[2] = [MESSAGES] of { bit };             /* what has been sent to side i */

/* Stores reach memory: relaxed ones in any order, release ones when they are the oldest. */
proctype Memory(byte me) {
    byte value;
end:
    do
    :: atomic { buffer[me]??record_word, 0, value -> record[me * DEPTH] = value }
    :: atomic { buffer[me]??record_word, 1, value -> record[me * DEPTH + 1] = value }
    :: atomic { buffer[me]??parked_word, 0, value -> parked[me] = value }
#ifdef RELAXED_TAIL
    :: atomic { buffer[me]??tail_word, 0, value -> tail[me] = value }
#else
    :: atomic { buffer[me]?tail_word, 0, value -> tail[me] = value }
#endif
    :: atomic { buffer[me]?head_word, 0, value -> head[OTHER] = value }
    od
}

inline fence() { empty(buffer[me]) }

/* RingWriter::write, then the message if it asks for one. */
inline send(number) {
    atomic {
        seen = head[me];
        /* An honest reader is never accused: what it has answered, it has taken. */
        assert(seen <= written && written - seen < DEPTH);
        buffer[me]!record_word, written % DEPTH, number
    }
    written++;
    buffer[me]!tail_word, 0, written;
#ifndef NO_WRITER_FENCE
    fence();
#endif
    atomic {
        seen = parked[OTHER];
        if
        :: seen % 2 == 1 && seen != rung ->
            rung = seen;
            if
            :: nfull(socket[OTHER]) -> socket[OTHER]!1
            :: full(socket[OTHER]) -> skip /* refused by the socket: enough are waiting there */
            fi
        :: else
        fi
        seen = 0
    }
}

/* RingReader::available */
inline look() {
    atomic {
        seen = tail[OTHER];
        assert(seen >= taken && seen - taken <= DEPTH);
        is_there = seen != taken;
        seen = 0
    }
}

/* RingReader::take: in order, whole, and once. */
inline take(number) {
    atomic {
#ifndef EARLY_LOAD
        early = record[OTHER * DEPTH + taken % DEPTH];
#endif
        assert(early == number);
        early = 0
    }
    taken++;
    buffer[me]!head_word, 0, taken
}

inline store_parked() {
    generation++;
    buffer[me]!parked_word, 0, generation
}

inline drain() {
    do
    :: socket[me]?_
    :: break /* at any time: the rest may still be on its way */
    od
}

/* Doorbell.receive */
inline receive(number) {
    do
    :: true ->
#ifdef EARLY_LOAD
        early = record[OTHER * DEPTH + taken % DEPTH]; /* the load that an acquire would hold back */
#endif
        look();
        if
        :: is_there -> break
        :: else
        fi;
#ifndef DRAIN_WHEN_PARKED
        drain();
#endif
        store_parked();
#ifndef NO_READER_FENCE
        fence();
#endif
#ifdef DRAIN_WHEN_PARKED
        drain();
#endif
#ifdef NO_SECOND_LOOK
        is_there = false;
#else
        look();
#endif
        if
        :: is_there
        :: else -> socket[me]?_ /* asleep */
        fi;
        store_parked() /* awake: even */
    od;
    is_there = false;
    take(number)
}

#define PRIVATE byte written, taken, rung, generation, seen, early; bool is_there

proctype Tee() {
    byte me = TEE;
    PRIVATE;
    do
    :: written < RECORDS && written - taken < DEPTH -> send(written + 1)
    :: written > taken -> receive(taken + 1)
    :: taken == RECORDS -> break
    od
}

proctype Gpu() {
    byte me = GPU;
    PRIVATE;
    do
    :: taken < RECORDS ->
        receive(taken + 1);
        send(taken)
    :: else -> break
    od
}

init {
    atomic {
        run Memory(TEE);
        run Memory(GPU);
        run Tee();
        run Gpu()
    }
}
