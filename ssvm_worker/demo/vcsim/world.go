package main

import (
	"context"
	"encoding/json"
	"net/http"
	"reflect"
	"strings"
	"sync"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"
)

// faults are what goes wrong from now on. The zero value is a healthy vCenter.
type faults struct {
	// Calls answers a method with a fault: {"ExportSnapshot": "TaskInProgress"}.
	Calls map[string]string `json:"calls"`
	// Hang is a method that is not answered while this fault lasts; its first HangAfter calls are.
	Hang      string `json:"hang"`
	HangAfter int    `json:"hang_after"`
	// Lacks are ids of privileges that the user does not have; SessionHas: though the session has them.
	Lacks      []string `json:"lacks"`
	SessionHas bool     `json:"session_has"`
	// Host is host:port at which the ESXi hosts are said to be; HostThumbprint is said to be theirs.
	Host           string `json:"host"`
	HostThumbprint string `json:"host_thumbprint"`
	// DescriptorError and DescriptorWarning are faults that CreateDescriptor reports.
	DescriptorError   string `json:"descriptor_error"`
	DescriptorWarning string `json:"descriptor_warning"`
	// Manifest is "absent" or "wrong" where a lease's is.
	Manifest string `json:"manifest"`
	// Consolidate leaves disks to be consolidated when a snapshot is removed.
	Consolidate bool `json:"consolidate"`
	// SnapshotTask is the fault that the task of CreateSnapshotEx ends with.
	SnapshotTask string `json:"snapshot_task"`
	// QuiesceTask is the same, but only where quiescing was asked for.
	QuiesceTask string `json:"quiesce_task"`
	// NeverReady leaves a lease in its first state; LeaseError is the fault that it ends with at once.
	NeverReady bool   `json:"never_ready"`
	LeaseError string `json:"lease_error"`
	// LeaseTimeout is how many seconds a lease lives without a Progress; 300 when it is 0.
	LeaseTimeout int32 `json:"lease_timeout"`
	// Thumbprint replaces the one that the lease gives.
	Thumbprint *string `json:"thumbprint"`
	// Certificate is the host's in PEM, which leases give since 9.0.
	Certificate string `json:"certificate"`
	// AnyHost puts "*" for the host of the URLs, as a standalone ESXi does.
	AnyHost bool `json:"any_host"`
	// PlainKeys names devices as govmomi does (disk:0), not as the real product (ParaVirtualSCSIController0:0).
	PlainKeys bool `json:"plain_keys"`
	// Omit is a file that the lease does not list.
	Omit string `json:"omit"`
	// Get goes wrong when a disk is fetched, Put when one is uploaded.
	Get *getFault `json:"get"`
	Put *getFault `json:"put"`
}

// getFault spoils the data stream of one file, or of all of them.
type getFault struct {
	// File is the base name; "" is any.
	File string `json:"file"`
	// Times is how many GETs are spoilt; 0 is all of them.
	Times int `json:"times"`
	// Status is answered in place of the data.
	Status int `json:"status"`
	// NeedsCookie answers 403 to a GET without the session's cookie.
	NeedsCookie bool `json:"needs_cookie"`
	// Do is done when At bytes have been sent: cut the connection, end the body properly, stall, expire the lease;
	// or logout, restart, delete, unsnap, migrate (see strike), and then cut, but for logout, which lets the data go on.
	Do string `json:"do"`
	At int64  `json:"at"`
}

// world is the simulator with what was added to it, and the record of what clients did.
type world struct {
	service    *simulator.Service
	registry   *simulator.Registry
	thumbprint string
	// address is host:port of the simulator, as soon as it listens.
	address string

	mu     sync.Mutex
	faults faults
	// healed is closed when the faults are replaced, so that whoever hangs goes on.
	healed chan struct{}
	leases map[string]*lease
	calls  map[string]int
	gets   []get
	puts   []put
	// sessions are those that made a call, by their keys, with what only they see.
	sessions map[string]*simulator.Registry
	// nvram is the content of each VM's, by the VM's id.
	nvram map[string][]byte
}

// get is one fetch of a file of a lease.
type get struct {
	File   string `json:"file"`
	Bytes  int64  `json:"bytes"`
	Cookie bool   `json:"cookie"`
}

func newWorld(service *simulator.Service, thumbprint string) *world {
	w := &world{
		service:    service,
		registry:   service.Context.Map,
		thumbprint: thumbprint,
		healed:     make(chan struct{}),
		leases:     map[string]*lease{},
		calls:      map[string]int{},
		sessions:   map[string]*simulator.Registry{},
		nvram:      map[string][]byte{},
	}
	w.registry.Handler = w.intercept
	return w
}

func (w *world) client() *vim25.Client {
	client, err := vim25.NewClient(context.Background(), w.service)
	must(err)
	return client
}

// now is the faults in force, and what tells that they no longer are.
func (w *world) now() (faults, <-chan struct{}) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.faults, w.healed
}

// intercept sees every call before the simulator does: it answers with a fault, or puts another receiver there.
func (w *world) intercept(ctx *simulator.Context, method *simulator.Method) (mo.Reference, types.BaseMethodFault) {
	w.mu.Lock()
	w.calls[method.Name]++
	if ctx.Session != nil {
		w.sessions[ctx.Session.Key] = ctx.Session.Registry
	}
	w.mu.Unlock()
	now, _ := w.now()
	if name := now.Calls[method.Name]; name != "" {
		return nil, newFault(name)
	}
	w.stepInto(ctx, method)
	if method.This.Type == "HttpNfcLease" {
		if method.Name == "HttpNfcLeaseAbort" {
			w.undo(method.This.Value)
		}
		return nil, w.leaseCall(method)
	}
	return nil, nil
}

// stepInto puts our receiver into the session, where calls look for one first; all else goes on seeing the simulator's.
func (w *world) stepInto(ctx *simulator.Context, method *simulator.Method) {
	if ctx.Session == nil {
		return
	}
	switch method.Name {
	case "HasUserPrivilegeOnEntities", "HasPrivilegeOnEntities":
		now, _ := w.now()
		mine := &authorization{lacks: now.Lacks, lenient: now.SessionHas}
		mine.Self = method.This
		ctx.Session.Registry.Put(mine)
	case "HttpNfcLeaseSetManifestChecksumType", "HttpNfcLeaseGetManifest":
		w.checkLease(ctx, method.This)
	}
	switch it := ctx.Map.Get(method.This).(type) {
	case *simulator.ResourcePool:
		if method.Name == "ImportVApp" {
			ctx.Session.Registry.Put(&pool{it, w})
		} else {
			ctx.Session.Registry.Remove(ctx, method.This)
		}
	case *simulator.VirtualMachineSnapshot:
		if method.Name == "ExportSnapshot" || method.Name == "RemoveSnapshot_Task" {
			ctx.Session.Registry.Put(&snapshot{it, w})
		} else {
			ctx.Session.Registry.Remove(ctx, method.This)
		}
	case *simulator.VirtualMachine:
		switch method.Name {
		case "CreateSnapshotEx_Task", "ConsolidateVMDisks_Task", "QueryChangedDiskAreas":
			ctx.Session.Registry.Put(&machine{it, w})
		default:
			ctx.Session.Registry.Remove(ctx, method.This)
		}
	}
}

// newFault makes the fault of that name: "TaskInProgress". What it must name is some task.
func newFault(name string) types.BaseMethodFault {
	kind, ok := types.TypeFunc()(name)
	if !ok {
		return new(types.RuntimeFault)
	}
	value := reflect.New(kind)
	some := reflect.ValueOf(types.ManagedObjectReference{Type: "Task", Value: "task-1"})
	for i := range kind.NumField() {
		if field := value.Elem().Field(i); field.Type() == some.Type() {
			field.Set(some)
		}
	}
	return value.Interface().(types.BaseMethodFault)
}

// handler adds the data streams and the control interface to the simulator's own paths.
func (w *world) handler(next http.Handler) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/", w.hanging(next))
	mux.HandleFunc("GET /nfc/", w.serveData)
	mux.HandleFunc("PUT /nfc/", w.takeData)
	mux.HandleFunc("POST /nfc/", w.takeData)
	mux.HandleFunc("POST /control/faults", w.setFaults)
	mux.HandleFunc("POST /control/machines", w.addMachine)
	mux.HandleFunc("POST /control/changes", w.addChanges)
	mux.HandleFunc("POST /control/age", w.ageSnapshots)
	mux.HandleFunc("GET /control/state", w.state)
	return mux
}

// setFaults replaces all faults, and forgets what was recorded.
func (w *world) setFaults(rw http.ResponseWriter, r *http.Request) {
	var next faults
	decoder := json.NewDecoder(r.Body)
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&next); err != nil {
		http.Error(rw, err.Error(), http.StatusBadRequest)
		return
	}
	w.nameHosts(next)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.faults = next
	close(w.healed)
	w.healed = make(chan struct{})
}

// state tells what clients did since the start, and which snapshots and leases there are.
func (w *world) state(rw http.ResponseWriter, _ *http.Request) {
	var names []string
	for _, each := range w.registry.All("VirtualMachine") {
		if vm := each.(*simulator.VirtualMachine); vm.Snapshot != nil {
			names = append(names, snapshotNames(vm.Snapshot.RootSnapshotList)...)
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	leases := map[string]any{}
	for id, each := range w.leases {
		leases[id] = map[string]any{"state": each.outcome, "renewals": each.renewals, "percent": each.percent}
	}
	_ = json.NewEncoder(rw).Encode(map[string]any{
		"snapshots": names, "leases": leases, "calls": w.calls, "gets": w.gets, "puts": w.puts,
	})
}

func snapshotNames(trees []types.VirtualMachineSnapshotTree) []string {
	var names []string
	for _, tree := range trees {
		names = append(names, tree.Name)
		names = append(names, snapshotNames(tree.ChildSnapshotList)...)
	}
	return names
}

// machine is a VM whose snapshots can fail.
type machine struct {
	*simulator.VirtualMachine
	world *world
}

func (m *machine) CreateSnapshotExTask(ctx *simulator.Context, req *types.CreateSnapshotEx_Task) soapFault {
	now, _ := m.world.now()
	name := now.SnapshotTask
	if name == "" && req.QuiesceSpec != nil {
		name = now.QuiesceTask
	}
	if name == "" {
		return m.VirtualMachine.CreateSnapshotExTask(ctx, req)
	}
	return failedSnapshot(ctx, m.VirtualMachine, newFault(name))
}

// baseName is the last part of a datastore path.
func baseName(path string) string {
	return path[strings.LastIndex(path, "/")+1:]
}
