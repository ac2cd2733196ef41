/* Download a file with three threads that only receive, hash and write. It shows what a program can reach at best.
 *
 *     bare PORT PATH FILE [CA]      http, or https with the authority in CA, from 127.0.0.1
 *
 * It prints nothing, checks no length, and ends with status 1 after an error. The chunk has the size that the worker
 * uses. Two chunks wait for each consumer. cc -O2 -o bare bare.c -lssl -lcrypto -lpthread
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <openssl/evp.h>
#include <openssl/ssl.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define CHUNK ((size_t)3584 * 1024)
#define BUFFERS 4

struct consumer {
	pthread_t thread;
	sem_t filled, emptied;
	void (*consume)(const char *data, size_t size);
};

static char *buffers[BUFFERS];
static size_t sizes[BUFFERS];
static int connection, file;
static SSL *tls;
static EVP_MD_CTX *hasher;

static void require(int ok, const char *what) {
	if (!ok) {
		fprintf(stderr, "bare: %s failed\n", what);
		exit(1);
	}
}

static void hash(const char *data, size_t size) {
	require(EVP_DigestUpdate(hasher, data, size), "hashing");
}

static void store(const char *data, size_t size) {
	while (size) {
		ssize_t done = write(file, data, size);
		require(done > 0, "writing");
		data += done;
		size -= done;
	}
}

static struct consumer consumers[] = {{.consume = hash}, {.consume = store}};
#define CONSUMERS (sizeof consumers / sizeof *consumers)

static void *run(void *argument) {
	struct consumer *own = argument;
	for (int i = 0;; i = (i + 1) % BUFFERS) {
		sem_wait(&own->filled);
		if (!sizes[i])
			return NULL;
		own->consume(buffers[i], sizes[i]);
		sem_post(&own->emptied);
	}
}

/* Remove the head of the response from the first chunk, and return the number of bytes that are left. */
static size_t without_head(char *buffer, size_t size) {
	char *end = memmem(buffer, size, "\r\n\r\n", 4);
	require(end && !strncmp(buffer, "HTTP/1.1 200", 12), "the request");
	size_t head = end + 4 - buffer;
	memmove(buffer, end + 4, size - head);
	return size - head;
}

/* Return the number of bytes that were read. It is less than a chunk only at the end. */
static size_t receive(char *buffer) {
	size_t got = 0, more;
	while (got < CHUNK) {
		if (tls) {
			if (SSL_read_ex(tls, buffer + got, CHUNK - got, &more) != 1)
				break;
		} else {
			ssize_t read = recv(connection, buffer + got, CHUNK - got, 0);
			if (read <= 0)
				break;
			more = read;
		}
		got += more;
	}
	return got;
}

static void start_tls(const char *authority) {
	SSL_CTX *context = SSL_CTX_new(TLS_client_method());
	require(SSL_CTX_load_verify_locations(context, authority, NULL), "reading the authority");
	SSL_CTX_set_verify(context, SSL_VERIFY_PEER, NULL);
	tls = SSL_new(context);
	SSL_set_fd(tls, connection);
	require(SSL_connect(tls) == 1, "the TLS handshake");
}

int main(int count, char **arguments) {
	require(count >= 4, "reading the arguments");
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(atoi(arguments[1]))};
	address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	connection = socket(AF_INET, SOCK_STREAM, 0);
	require(connect(connection, (struct sockaddr *)&address, sizeof address) == 0, "connecting");
	if (count > 4)
		start_tls(arguments[4]);
	file = open(arguments[3], O_CREAT | O_TRUNC | O_WRONLY, 0600);
	require(file >= 0, "opening the file");
	hasher = EVP_MD_CTX_new();
	EVP_DigestInit_ex(hasher, EVP_sha256(), NULL);

	char request[1024];
	int length = snprintf(request, sizeof request, "GET %s HTTP/1.0\r\n\r\n", arguments[2]);
	if (tls)
		require(SSL_write(tls, request, length) == length, "sending");
	else
		require(send(connection, request, length, 0) == length, "sending");

	for (int i = 0; i < BUFFERS; i++)
		buffers[i] = malloc(CHUNK);
	for (size_t k = 0; k < CONSUMERS; k++) {
		sem_init(&consumers[k].filled, 0, 0);
		sem_init(&consumers[k].emptied, 0, BUFFERS - 1);
		pthread_create(&consumers[k].thread, NULL, run, &consumers[k]);
	}
	for (int i = 0, more = 1, first = 1; more; i = (i + 1) % BUFFERS) {
		for (size_t k = 0; k < CONSUMERS; k++)
			sem_wait(&consumers[k].emptied);
		sizes[i] = receive(buffers[i]);
		if (first)
			sizes[i] = without_head(buffers[i], sizes[i]);
		more = sizes[i] > 0;
		first = 0;
		for (size_t k = 0; k < CONSUMERS; k++)
			sem_post(&consumers[k].filled);
	}
	for (size_t k = 0; k < CONSUMERS; k++)
		pthread_join(consumers[k].thread, NULL);
	return fsync(file) != 0;
}
