/* Traffic through a router, and what became of it: client and server in one process, each thread in its namespace.
 *
 *     blast --client NETNS --server NETNS --address IPV4 [--cpu N] --seconds S WHAT...
 *
 *     --udp RATE          packets of 22 bytes payload per second in one flow that the server has answered once;
 *                         0 = as many as go
 *     --new RATE          the same, each packet from a port or an address of its own: every one begins a connection
 *     --ping US           a UDP packet to and fro every so many microseconds, 0 = one after the other
 *     --conns N           TCP connections, N at a time: open, one request, one answer, close
 *     --request US        the same one at a time, every so many microseconds
 *
 * They may be combined and run at the same time. Prints one JSON object; latencies in microseconds.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <netinet/ip.h>
#include <netinet/udp.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
    PAYLOAD = 22,
    UDP_PORT = 9001,
    PING_PORT = 9002,
    NEW_PORT = 9003,
    PORTS_FROM = 1024, /* of those that begin connections, and the last byte of their addresses */
    HOSTS_FROM = 3,
    HOSTS_TO = 254,
    TCP_PORT = 9100,
    TCP_PORTS = 16, /* so that a client port seldom meets the TIME_WAIT of its last use */
    BATCH = 64,
    TICK_NS = 50000, /* at a given rate the sender wakes this often and sends what is due */
    SINK_PAUSE_NS = 1000000,
    PATIENCE_MS = 1000, /* a ping or a connection without an answer for so long is lost */
    QUIET_MS = 200,     /* nothing arrived for so long: nothing more will arrive */
    DRAIN_MS = 5000,
    REQUEST = 80,
    ANSWER = 200,
    CONNS_MAX = 256,
};

static const char *client_netns, *server_netns;
static struct in_addr server_address;
static double seconds = 1;
static atomic_bool stop;        /* the clients are through */
static atomic_int servers_ready;

static void die(const char *what)
{
    fprintf(stderr, "blast: %s: %s\n", what, strerror(errno));
    exit(1);
}

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void sleep_until(int64_t at_ns)
{
    struct timespec t = {at_ns / 1000000000, at_ns % 1000000000};
    clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL);
}

/* Move this thread into a namespace; its timers are to be exact. */
static void enter(const char *netns)
{
    char path[256];
    snprintf(path, sizeof path, "/run/netns/%s", netns);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || setns(fd, CLONE_NEWNET) < 0)
        die(path);
    close(fd);
    prctl(PR_SET_TIMERSLACK, 1);
}

/* Go first on this processor: what is measured is the way of the packet, not the wait for our own other threads. */
static void go_first(void)
{
    struct sched_param first = {.sched_priority = 1};
    if (sched_setscheduler(0, SCHED_FIFO, &first) < 0)
        die("sched_setscheduler");
}

static struct sockaddr_in server_at(int port)
{
    return (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons(port), .sin_addr = server_address};
}

static int server_socket(int type, int port)
{
    int fd = socket(AF_INET, type | SOCK_CLOEXEC, 0), one = 1;
    struct sockaddr_in at = server_at(port);
    if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one) < 0 ||
        bind(fd, (struct sockaddr *)&at, sizeof at) < 0)
        die("server socket");
    return fd;
}

static int client_socket(int port)
{
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    struct sockaddr_in to = server_at(port);
    if (fd < 0 || connect(fd, (struct sockaddr *)&to, sizeof to) < 0)
        die("client socket");
    return fd;
}

static void wait_ms(int fd, int ms)
{
    struct pollfd waiting = {fd, POLLIN, 0};
    poll(&waiting, 1, ms);
}

/* --- Latencies: kept one by one, for percentiles that are exact ------------------------------------------------ */

struct samples {
    uint32_t *ns;
    size_t count, room;
};

static void keep(struct samples *s, int64_t ns)
{
    if (s->count == s->room) {
        s->room = s->room ? 2 * s->room : 4096;
        s->ns = realloc(s->ns, s->room * sizeof *s->ns);
        if (!s->ns)
            die("realloc");
    }
    s->ns[s->count++] = ns > UINT32_MAX ? UINT32_MAX : ns;
}

static int by_size(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

static double percentile_us(const struct samples *s, double part)
{
    return s->count ? s->ns[(size_t)((s->count - 1) * part)] / 1e3 : 0;
}

static void print_latency(struct samples *s)
{
    qsort(s->ns, s->count, sizeof *s->ns, by_size);
    printf("\"p50_us\": %.1f, \"p99_us\": %.1f, \"p999_us\": %.1f, \"max_us\": %.1f", percentile_us(s, 0.5),
           percentile_us(s, 0.99), percentile_us(s, 0.999), percentile_us(s, 1));
}

/* --- UDP in one direction -------------------------------------------------------------------------------------- */

static long udp_rate = -1; /* -1 = none */
static atomic_long udp_received;
static long udp_sent;
static double udp_seconds;

static struct mmsghdr *messages(char payloads[BATCH][2048], struct iovec *parts, struct mmsghdr *m, size_t length)
{
    for (int i = 0; i < BATCH; i++) {
        parts[i] = (struct iovec){payloads[i], length};
        m[i] = (struct mmsghdr){.msg_hdr = {.msg_iov = &parts[i], .msg_iovlen = 1}};
    }
    return m;
}

static int sink_socket(int port)
{
    int fd = server_socket(SOCK_DGRAM, port), room = 64 << 20;
    if (setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof room) < 0)
        die("SO_RCVBUFFORCE");
    servers_ready++;
    return fd;
}

static void count_arrivals(int fd, atomic_long *received)
{
    char payloads[BATCH][2048];
    struct iovec parts[BATCH];
    struct mmsghdr m[BATCH];
    messages(payloads, parts, m, sizeof payloads[0]);
    while (!stop) {
        /* Waking up for each packet would take the processor from the sender. */
        sleep_until(now_ns() + SINK_PAUSE_NS);
        int got;
        while ((got = recvmmsg(fd, m, BATCH, MSG_DONTWAIT, NULL)) > 0)
            *received += got;
    }
}

/* Send at a rate until time is up; `renew` makes other packets of those that were sent. Returns the seconds it took. */
static double send_messages(int fd, struct mmsghdr *m, long rate, long *count, void (*renew)(struct mmsghdr *, int))
{
    int64_t begin = now_ns(), end = begin + seconds * 1e9, now, tick = begin;
    while ((now = now_ns()) < end) {
        long due = rate ? (now - begin) / 1e9 * rate - *count : BATCH;
        while (due > 0) {
            int sent = sendmmsg(fd, m, due < BATCH ? due : BATCH, 0);
            if (sent < 0)
                die("sendmmsg");
            if (renew)
                renew(m, sent);
            *count += sent;
            due -= sent;
            if (now_ns() >= end)
                break;
        }
        if (rate)
            sleep_until(tick = tick + TICK_NS > now ? tick + TICK_NS : now);
    }
    return (now_ns() - begin) / 1e9;
}

static void *udp_sink(void *unused)
{
    enter(server_netns);
    int fd = sink_socket(UDP_PORT);
    struct sockaddr_in from;
    socklen_t length = sizeof from;
    char hello[PAYLOAD];
    if (recvfrom(fd, hello, sizeof hello, 0, (struct sockaddr *)&from, &length) < 0 ||
        sendto(fd, hello, sizeof hello, 0, (struct sockaddr *)&from, length) < 0)
        die("hello");
    count_arrivals(fd, &udp_received);
    return unused;
}

static void *udp_sender(void *unused)
{
    static char payloads[BATCH][2048];
    struct iovec parts[BATCH];
    struct mmsghdr m[BATCH];
    enter(client_netns);
    int fd = client_socket(UDP_PORT);
    messages(payloads, parts, m, PAYLOAD);
    /* The answer to the first packet makes it an established connection for every tracker on the way. */
    if (send(fd, payloads[0], PAYLOAD, 0) < 0)
        die("hello");
    wait_ms(fd, PATIENCE_MS);
    if (recv(fd, payloads[0], PAYLOAD, MSG_DONTWAIT) < 0)
        die("the first packet was not answered");
    udp_seconds = send_messages(fd, m, udp_rate, &udp_sent, NULL);
    return unused;
}

/* --- Packets that begin connections ---------------------------------------------------------------------------- */

static long new_rate = -1; /* -1 = none */
static atomic_long new_received;
static long new_sent;
static double new_seconds;

struct new_packet {
    struct iphdr ip;
    struct udphdr udp;
    char payload[PAYLOAD];
};

static void *new_sink(void *unused)
{
    enter(server_netns);
    count_arrivals(sink_socket(NEW_PORT), &new_received);
    return unused;
}

/* Give packets that were sent the next ports and addresses: none comes again before 16 million others. */
static void begin_others(struct mmsghdr *m, int count)
{
    static uint16_t port = PORTS_FROM;
    static uint8_t host = HOSTS_FROM;
    for (int i = 0; i < count; i++) {
        struct new_packet *packet = m[i].msg_hdr.msg_iov->iov_base;
        packet->udp.source = htons(port);
        ((uint8_t *)&packet->ip.saddr)[3] = host;
        if (++port == 0) {
            port = PORTS_FROM;
            host = host == HOSTS_TO ? HOSTS_FROM : host + 1;
        }
    }
}

static void *new_sender(void *unused)
{
    static char packets[BATCH][2048];
    struct iovec parts[BATCH];
    struct mmsghdr m[BATCH];
    enter(client_netns);
    struct sockaddr_in to = server_at(0), self;
    socklen_t length = sizeof self;
    int near = client_socket(NEW_PORT), fd = socket(AF_INET, SOCK_RAW | SOCK_CLOEXEC, IPPROTO_RAW);
    if (getsockname(near, (struct sockaddr *)&self, &length) < 0 || fd < 0 ||
        connect(fd, (struct sockaddr *)&to, sizeof to) < 0)
        die("raw socket");
    for (int i = 0; i < BATCH; i++)
        *(struct new_packet *)packets[i] = (struct new_packet){
            .ip = {.version = 4, .ihl = 5, .ttl = 64, .protocol = IPPROTO_UDP, .saddr = self.sin_addr.s_addr,
                   .daddr = server_address.s_addr},
            .udp = {.dest = htons(NEW_PORT), .len = htons(sizeof(struct udphdr) + PAYLOAD)}};
    messages(packets, parts, m, sizeof(struct new_packet));
    begin_others(m, BATCH);
    new_seconds = send_messages(fd, m, new_rate, &new_sent, begin_others);
    return unused;
}

/* --- UDP to and fro -------------------------------------------------------------------------------------------- */

static long ping_us = -1; /* -1 = none */
static struct samples pings;
static long pings_lost;

static void *ponger(void *unused)
{
    enter(server_netns);
    go_first();
    int fd = server_socket(SOCK_DGRAM, PING_PORT);
    servers_ready++;
    char payload[PAYLOAD];
    for (;;) {
        struct sockaddr_in from;
        socklen_t length = sizeof from;
        ssize_t got = recvfrom(fd, payload, sizeof payload, 0, (struct sockaddr *)&from, &length);
        if (got > 0)
            sendto(fd, payload, got, 0, (struct sockaddr *)&from, length);
    }
    return unused;
}

static void *pinger(void *unused)
{
    enter(client_netns);
    go_first();
    int fd = client_socket(PING_PORT);
    char payload[PAYLOAD] = {0};
    int64_t end = now_ns() + seconds * 1e9, begin;
    uint64_t number = 0, answer;
    while ((begin = now_ns()) < end) {
        memcpy(payload, &number, sizeof number);
        if (send(fd, payload, sizeof payload, 0) < 0)
            die("ping");
        for (;;) {
            int64_t left_ms = PATIENCE_MS - (now_ns() - begin) / 1000000;
            if (left_ms > 0)
                wait_ms(fd, left_ms);
            if (recv(fd, payload, sizeof payload, MSG_DONTWAIT) < 0) {
                if (left_ms > 0)
                    continue;
                pings_lost++;
                break;
            }
            memcpy(&answer, payload, sizeof answer);
            if (answer == number) { /* not a late one */
                if (number)         /* the first one opened the connection */
                    keep(&pings, now_ns() - begin);
                break;
            }
        }
        number++;
        if (ping_us)
            sleep_until(begin + ping_us * 1000);
    }
    return unused;
}

/* --- TCP connections ------------------------------------------------------------------------------------------- */

static long conns_parallel; /* 0 = none */
static long conns_us;
static struct samples conns;
static long conns_failed;
static double conns_seconds;

#define LISTENS (1ULL << 32)

static void *tcp_server(void *unused)
{
    static char request[REQUEST], answer[ANSWER];
    enter(server_netns);
    if (conns_us)
        go_first();
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    for (int i = 0; i < TCP_PORTS; i++) {
        int listener = server_socket(SOCK_STREAM | SOCK_NONBLOCK, TCP_PORT + i);
        struct epoll_event event = {.events = EPOLLIN, .data.u64 = LISTENS | listener};
        if (listen(listener, 1024) < 0 || epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &event) < 0)
            die("listen");
    }
    servers_ready++;
    for (;;) {
        struct epoll_event events[BATCH];
        int count = epoll_wait(epoll, events, BATCH, -1);
        for (int i = 0; i < count; i++) {
            int fd = events[i].data.u64 & ~LISTENS, made;
            if (events[i].data.u64 & LISTENS) {
                while ((made = accept4(fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
                    struct epoll_event event = {.events = EPOLLIN, .data.u64 = made};
                    epoll_ctl(epoll, EPOLL_CTL_ADD, made, &event);
                }
                continue;
            }
            if (recv(fd, request, sizeof request, 0) > 0)
                send(fd, answer, sizeof answer, MSG_NOSIGNAL); /* the client counts what fails */
            close(fd);
        }
    }
    return unused;
}

struct conn {
    int fd;
    int64_t begin;
    int asked;
};

static void open_conn(int epoll, struct conn *conn, int port)
{
    struct sockaddr_in to = server_at(TCP_PORT + port);
    conn->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    conn->begin = now_ns();
    conn->asked = 0;
    if (conn->fd < 0 || (connect(conn->fd, (struct sockaddr *)&to, sizeof to) < 0 && errno != EINPROGRESS))
        die("connect");
    struct epoll_event event = {.events = EPOLLOUT, .data.ptr = conn};
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, conn->fd, &event) < 0)
        die("epoll_ctl");
}

/* One step of a connection: 0 = goes on, 1 = done, -1 = failed. */
static int step(int epoll, struct conn *conn, uint32_t events)
{
    static char request[REQUEST], answer[4 * ANSWER];
    if (!conn->asked) {
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = conn};
        conn->asked = 1;
        if (send(conn->fd, request, sizeof request, MSG_NOSIGNAL) < 0)
            return -1;
        epoll_ctl(epoll, EPOLL_CTL_MOD, conn->fd, &event);
        return 0;
    }
    if (events & EPOLLERR)
        return -1;
    for (;;) {
        ssize_t got = recv(conn->fd, answer, sizeof answer, 0);
        if (got == 0)
            return 1;
        if (got < 0)
            return errno == EAGAIN ? 0 : -1;
    }
}

static void *tcp_client(void *unused)
{
    static struct conn open[CONNS_MAX];
    enter(client_netns);
    if (conns_us)
        go_first();
    int epoll = epoll_create1(EPOLL_CLOEXEC), port = 0;
    int64_t begin = now_ns(), end = begin + seconds * 1e9, now, looked = begin;
    for (int i = 0; i < conns_parallel; i++)
        open_conn(epoll, &open[i], port++ % TCP_PORTS);
    while ((now = now_ns()) < end) {
        struct epoll_event events[BATCH];
        int count = epoll_wait(epoll, events, BATCH, 100);
        for (int i = 0; i < count; i++) {
            struct conn *conn = events[i].data.ptr;
            int done = step(epoll, conn, events[i].events);
            if (!done)
                continue;
            if (done > 0)
                keep(&conns, now_ns() - conn->begin);
            else
                conns_failed++;
            close(conn->fd);
            if (conns_us)
                sleep_until(conn->begin + conns_us * 1000);
            open_conn(epoll, conn, port++ % TCP_PORTS);
        }
        if (now - looked < PATIENCE_MS * 1000000LL)
            continue;
        looked = now;
        for (int i = 0; i < conns_parallel; i++)
            if (now - open[i].begin > 4 * PATIENCE_MS * 1000000LL) { /* time for two retransmissions */
                conns_failed++;
                close(open[i].fd);
                open_conn(epoll, &open[i], port++ % TCP_PORTS);
            }
    }
    conns_seconds = (now_ns() - begin) / 1e9;
    return unused;
}

/* --------------------------------------------------------------------------------------------------------------- */

static pthread_t start(void *(*function)(void *))
{
    pthread_t thread;
    errno = pthread_create(&thread, NULL, function, NULL);
    if (errno)
        die("pthread_create");
    return thread;
}

static void pin(int cpu)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    if (sched_setaffinity(0, sizeof set, &set) < 0)
        die("sched_setaffinity");
}

static void options(int argc, char **argv)
{
    static const struct option known[] = {
        {"client", 1, 0, 'c'}, {"server", 1, 0, 's'}, {"address", 1, 0, 'a'}, {"cpu", 1, 0, 'p'},
        {"seconds", 1, 0, 't'}, {"udp", 1, 0, 'u'}, {"new", 1, 0, 'w'}, {"ping", 1, 0, 'i'}, {"conns", 1, 0, 'n'},
        {"request", 1, 0, 'r'}, {0}};
    int option;
    while ((option = getopt_long(argc, argv, "", known, NULL)) != -1)
        switch (option) {
        case 'c': client_netns = optarg; break;
        case 's': server_netns = optarg; break;
        case 'a': inet_aton(optarg, &server_address); break;
        case 'p': pin(atoi(optarg)); break;
        case 't': seconds = atof(optarg); break;
        case 'u': udp_rate = atol(optarg); break;
        case 'w': new_rate = atol(optarg); break;
        case 'i': ping_us = atol(optarg); break;
        case 'n': conns_parallel = atol(optarg) < CONNS_MAX ? atol(optarg) : CONNS_MAX; break;
        case 'r': conns_parallel = 1, conns_us = atol(optarg); break;
        default: exit(2);
        }
    if (!client_netns || !server_netns || !server_address.s_addr) {
        fprintf(stderr, "blast: --client, --server and --address are needed\n");
        exit(2);
    }
}

int main(int argc, char **argv)
{
    pthread_t sink = 0, sender = 0, new_end = 0, newcomer = 0, ping = 0, client = 0;
    const char *comma = "";
    int servers = 0;
    options(argc, argv);
    if (udp_rate >= 0)
        sink = start(udp_sink), servers++;
    if (new_rate >= 0)
        new_end = start(new_sink), servers++;
    if (ping_us >= 0)
        start(ponger), servers++;
    if (conns_parallel)
        start(tcp_server), servers++;
    while (servers_ready < servers)
        sleep_until(now_ns() + 1000000);
    if (udp_rate >= 0)
        sender = start(udp_sender);
    if (new_rate >= 0)
        newcomer = start(new_sender);
    if (ping_us >= 0)
        ping = start(pinger);
    if (conns_parallel)
        client = start(tcp_client);
    printf("{");
    if (client) {
        pthread_join(client, NULL);
        printf("\"tcp\": {\"done\": %zu, \"failed\": %ld, \"per_second\": %.1f, ", conns.count, conns_failed,
               conns.count / conns_seconds);
        print_latency(&conns);
        printf("}");
        comma = ", ";
    }
    if (ping) {
        pthread_join(ping, NULL);
        printf("%s\"ping\": {\"done\": %zu, \"lost\": %ld, ", comma, pings.count, pings_lost);
        print_latency(&pings);
        printf("}");
        comma = ", ";
    }
    if (sender)
        pthread_join(sender, NULL);
    long in_time = udp_received, before;
    if (newcomer)
        pthread_join(newcomer, NULL);
    int64_t end = now_ns() + DRAIN_MS * 1000000LL;
    do {
        before = udp_received + new_received;
        sleep_until(now_ns() + QUIET_MS * 1000000LL);
    } while (udp_received + new_received != before && now_ns() < end);
    stop = true;
    if (sender) {
        pthread_join(sink, NULL);
        printf("%s\"udp\": {\"sent\": %ld, \"received\": %ld, \"seconds\": %.4f, \"sent_pps\": %.1f, "
               "\"delivered_pps\": %.1f, \"loss\": %.6f}",
               comma, udp_sent, (long)udp_received, udp_seconds, udp_sent / udp_seconds, in_time / udp_seconds,
               udp_sent ? 1 - (double)udp_received / udp_sent : 0);
        comma = ", ";
    }
    if (newcomer) {
        pthread_join(new_end, NULL);
        printf("%s\"new\": {\"sent\": %ld, \"received\": %ld, \"sent_pps\": %.1f}", comma, new_sent, (long)new_received,
               new_sent / new_seconds);
    }
    printf("}\n");
    return 0;
}
