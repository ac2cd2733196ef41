package main

import (
	"net/http"
	"strings"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/soap"
)

// serveData serves a file of a lease as a host does: chunked, to whoever knows the URL, until the lease ends.
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
		http.Error(rw, "no session", http.StatusForbidden)
		return
	}
	rw.Header().Set("Content-Type", "application/x-vnd.vmware-streamVmdk")
	wire := &wire{ResponseWriter: rw, lease: mine, spoilt: spoilt, healed: healed, gone: r.Context().Done()}
	defer func() {
		w.mu.Lock()
		w.gets[number].Bytes = wire.sent
		w.mu.Unlock()
	}()
	rw.(http.Flusher).Flush() // the length is not known to a real host: chunked
	simulator.ServeNFC(wire, r)
}

// begin notes a fetch; the fault is a copy, spent by one.
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
		fault.Times = 0 // for ever
	} else if fault.Times == 0 {
		fault.Times = -1 // spent
	}
	return mine, spoilt, w.healed, len(w.gets) - 1
}

// wire is a connection that goes wrong after so many bytes.
type wire struct {
	http.ResponseWriter
	lease  *lease
	spoilt getFault
	healed <-chan struct{}
	gone   <-chan struct{}
	sent   int64
}

// WriteHeader is called once too often by the simulator.
func (w *wire) WriteHeader(int) {}

func (w *wire) Write(data []byte) (int, error) {
	select {
	case <-w.lease.expired:
		panic(http.ErrAbortHandler)
	default:
	}
	if w.spoilt.Do == "" || w.sent+int64(len(data)) < w.spoilt.At {
		n, err := w.ResponseWriter.Write(data)
		w.sent += int64(n)
		return n, err
	}
	n, _ := w.ResponseWriter.Write(data[:w.spoilt.At-w.sent])
	w.sent += int64(n)
	w.ResponseWriter.(http.Flusher).Flush()
	return n, w.goWrong()
}

// goWrong does what the fault says; it returns only where the body is to end as if it were whole.
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
	}
	panic(http.ErrAbortHandler)
}
