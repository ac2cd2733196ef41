package main

import (
	"crypto/sha1"
	"crypto/sha256"
	"crypto/tls"
	"net/http"
	"strings"
	"time"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/soap"
)

// serveData serves a file of a lease like a real host: chunked, without a login, until the lease ends.
func (w *world) serveData(rw http.ResponseWriter, r *http.Request) {
	parts := strings.Split(r.URL.Path, "/")
	id, file := parts[len(parts)-2], parts[len(parts)-1]
	_, err := r.Cookie(soap.SessionCookieName)
	mine, spoilt, healed, number := w.begin(id, file, err == nil)
	if mine == nil {
		http.NotFound(rw, r)
		return
	}
	if spoilt.Status != 0 {
		http.Error(rw, "spoilt", spoilt.Status)
		return
	}
	if spoilt.NeedsCookie && err != nil {
		w.mu.Lock()
		w.gets[number].Refused = true
		w.mu.Unlock()
		http.Error(rw, "no session", http.StatusForbidden)
		return
	}
	rw.Header().Set("Content-Type", "application/x-vnd.vmware-streamVmdk")
	now, _ := w.now()
	if strings.HasPrefix(now.BodyEnd, "close") {
		rw.Header().Set("Transfer-Encoding", "identity") // only the end of the connection ends the body
	}
	if now.OneFile && !w.isFirst(mine, file) {
		return
	}
	wire := &wire{ResponseWriter: rw, world: w, lease: mine, spoilt: spoilt, healed: healed, gone: r.Context().Done()}
	defer func() {
		w.mu.Lock()
		w.gets[number].Bytes = wire.sent
		w.mu.Unlock()
	}()
	stored, _ := w.placeOf(mine.vm, file)
	wire.sums = w.summing(mine, file, stored)
	if vm, found := strings.CutSuffix(file, ".nvram"); found {
		_, _ = wire.Write(w.nvramOf(vm))
		return
	}
	rw.(http.Flusher).Flush() // a real host does not know the length, so it sends chunks
	simulator.ServeNFC(wire, r)
	endBody(rw, now.BodyEnd)
}

// endBody ends the connection after the last byte of a body. See BodyEnd.
func endBody(rw http.ResponseWriter, how string) {
	rw.(http.Flusher).Flush()
	switch how {
	case "no_last_chunk":
		panic(http.ErrAbortHandler) // Go then sends a close_notify
	case "no_last_chunk_cut", "close_cut":
		if conn, _, err := rw.(http.Hijacker).Hijack(); err == nil {
			_ = conn.(*tls.Conn).NetConn().Close() // no close_notify
		}
	}
}

// isFirst returns whether no other file of the lease was read before.
func (w *world) isFirst(mine *lease, file string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(mine.sent) == 0 || (len(mine.sent) == 1 && mine.sent[file] != nil)
}

// begin records a GET and returns its lease and a copy of the active fault, whose remaining count it decrements.
func (w *world) begin(id, file string, cookie bool) (*lease, getFault, <-chan struct{}, int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	mine := w.leases[id]
	if mine == nil || mine.outcome != "open" {
		return nil, getFault{}, nil, 0
	}
	w.gets = append(w.gets, get{File: file, Cookie: cookie})
	fault := w.faults.Get
	if fault == nil || (fault.File != "" && fault.File != file) || fault.Times < 0 {
		return mine, getFault{}, w.healed, len(w.gets) - 1
	}
	spoilt := *fault
	if fault.Times--; spoilt.Times == 0 {
		fault.Times = 0 // no limit
	} else if fault.Times == 0 {
		fault.Times = -1 // used up
	}
	return mine, spoilt, w.healed, len(w.gets) - 1
}

// summing resets the checksums of a file and returns them. See sums for stored.
func (w *world) summing(mine *lease, file, stored string) *sums {
	w.mu.Lock()
	defer w.mu.Unlock()
	mine.sent[file] = &sums{sha1: sha1.New(), sha256: sha256.New(), stored: stored}
	return mine.sent[file]
}

// wire is a connection that fails after a given number of bytes.
type wire struct {
	http.ResponseWriter
	world  *world
	lease  *lease
	sums   *sums
	spoilt getFault
	healed <-chan struct{}
	gone   <-chan struct{}
	sent   int64
}

// WriteHeader does nothing, because the simulator calls it once too often.
func (w *wire) WriteHeader(int) {}

func (w *wire) Write(data []byte) (int, error) {
	select {
	case <-w.lease.expired:
		panic(http.ErrAbortHandler)
	default:
	}
	if w.spoilt.Do == "" || w.sent+int64(len(data)) < w.spoilt.At {
		return w.pass(data)
	}
	if w.spoilt.Do == "silence" {
		w.spoilt.Do = ""
		w.ResponseWriter.(http.Flusher).Flush()
		time.Sleep(time.Duration(w.spoilt.Seconds * float64(time.Second)))
		return w.Write(data)
	}
	if now, _ := w.world.now(); w.spoilt.Do == "logout" || (w.spoilt.Do == "migrate" && now.Move != "") {
		event := w.spoilt.Do
		w.spoilt.Do = ""
		w.world.strike(event, w.lease.vm)
		return w.Write(data)
	}
	n, _ := w.pass(data[:w.spoilt.At-w.sent])
	w.ResponseWriter.(http.Flusher).Flush()
	return n, w.goWrong()
}

func (w *wire) pass(data []byte) (int, error) {
	n, err := w.ResponseWriter.Write(data)
	w.sent += int64(n)
	w.sums.add(data[:n])
	return n, err
}

// goWrong executes the fault. It returns only for the fault "end", which ends the body properly but too early.
func (w *wire) goWrong() error {
	switch w.spoilt.Do {
	case "end":
		return http.ErrContentLength
	case "stall":
		select {
		case <-w.healed:
		case <-w.gone:
		}
	case "expire":
		w.lease.expire()
	default:
		w.world.strike(w.spoilt.Do, w.lease.vm)
	}
	panic(http.ErrAbortHandler)
}
