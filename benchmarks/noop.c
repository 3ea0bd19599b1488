/* The bar to measure against: accept every packet of one or two queues, one verdict at a time.
 *
 *     noop LENGTH SOCKET_BUFFER QUEUE [QUEUE]
 *
 * What a first program on libnetfilter_queue does: copy the packet, call back, set the verdict. With two queues the
 * second one (POSTROUTING) goes first and the first one yields after 64 packets, as conntrackd does it. Prints "ready".
 */
#include <arpa/inet.h>
#include <errno.h>
#include <libnetfilter_queue/libnetfilter_queue.h>
#include <linux/netfilter.h>
#include <linux/netlink.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>

enum { YIELD_AFTER = 64, SECOND_BUDGET = 512 };

static char buffer[1 << 17] __attribute__((aligned));

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static int on_packet(struct nfq_q_handle *queue, struct nfgenmsg *message, struct nfq_data *packet, void *data)
{
    (void)message;
    (void)data;
    return nfq_set_verdict(queue, ntohl(nfq_get_msg_packet_hdr(packet)->packet_id), NF_ACCEPT, 0, NULL);
}

static struct nfq_handle *open_queue(int number, int length, int socket_buffer)
{
    struct nfq_handle *handle = nfq_open();
    if (!handle)
        die("nfq_open");
    struct nfq_q_handle *queue = nfq_create_queue(handle, number, on_packet, NULL);
    if (!queue)
        die("nfq_create_queue");
    if (nfq_set_mode(queue, NFQNL_COPY_PACKET, 0xffff) < 0 || nfq_set_queue_maxlen(queue, length) < 0)
        die("nfq_set_mode");
    int one = 1;
    if (setsockopt(nfq_fd(handle), SOL_SOCKET, SO_RCVBUFFORCE, &socket_buffer, sizeof socket_buffer) < 0 ||
        setsockopt(nfq_fd(handle), SOL_NETLINK, NETLINK_NO_ENOBUFS, &one, sizeof one) < 0)
        die("setsockopt");
    return handle;
}

/* Receive one message; 0 when nothing waits. */
static int turn(struct nfq_handle *handle, int flags)
{
    ssize_t length = recv(nfq_fd(handle), buffer, sizeof buffer, flags);
    if (length >= 0)
        nfq_handle_packet(handle, buffer, length);
    else if (errno == EAGAIN)
        return 0;
    else if (errno != EINTR)
        die("recv");
    return 1;
}

int main(int argc, char **argv)
{
    if (argc < 4 || argc > 5) {
        fprintf(stderr, "noop LENGTH SOCKET_BUFFER QUEUE [QUEUE]\n");
        return 2;
    }
    int length = atoi(argv[1]), socket_buffer = atoi(argv[2]);
    struct nfq_handle *first = open_queue(atoi(argv[3]), length, socket_buffer);
    struct nfq_handle *second = argc == 5 ? open_queue(atoi(argv[4]), length, socket_buffer) : NULL;
    puts("ready");
    fflush(stdout);
    while (!second)
        turn(first, 0);
    struct pollfd waiting[2] = {{nfq_fd(second), POLLIN, 0}, {nfq_fd(first), POLLIN, 0}};
    for (;;) {
        if (poll(waiting, 2, -1) < 0 && errno != EINTR)
            die("poll");
        if (waiting[0].revents)
            for (int i = 0; i < SECOND_BUDGET && turn(second, MSG_DONTWAIT); i++)
                ;
        if (waiting[1].revents)
            for (int i = 0; i < YIELD_AFTER && turn(first, MSG_DONTWAIT); i++)
                ;
    }
}
