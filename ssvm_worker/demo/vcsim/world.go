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

// faults contains the active faults. The zero value is a vCenter without faults.
type faults struct {
	// Calls contains the fault that a method returns: {"ExportSnapshot": "TaskInProgress"}.
	Calls map[string]*callFault `json:"calls"`
	// UnknownFault is a method that answers with a fault of a newer version, which no client knows.
	UnknownFault string `json:"unknown_fault"`
	// Hang is a method whose calls hang while this fault is active, except the first HangAfter calls.
	Hang      string `json:"hang"`
	HangAfter int    `json:"hang_after"`
	// Lacks contains ids of privileges that the user lacks. With SessionHas, the session still has them.
	Lacks      []string `json:"lacks"`
	SessionHas bool     `json:"session_has"`
	// License is the edition key of the server's license; "" means an evaluation.
	License string `json:"license"`
	// NoDrs is a fault that an import without a host returns in a cluster. The cluster then has no DRS.
	NoDrs string `json:"no_drs"`
	// Maintenance is the number of the cluster's hosts in maintenance mode.
	Maintenance int `json:"maintenance"`
	// HostMaintenance puts all hosts into maintenance mode.
	HostMaintenance bool `json:"host_maintenance"`
	// StoragePod puts all datastores into the datastore cluster POD0, which is empty without it.
	StoragePod bool `json:"storage_pod"`
	// DatastoreFree is the free space of every datastore in percent; 0 means 50.
	DatastoreFree int64 `json:"datastore_free"`
	// Host replaces the host:port of the ESXi hosts, also in leases. HostThumbprint replaces their thumbprint.
	Host string `json:"host"`
	// HostCertificate is the PEM that a host has instead of its thumbprint since vSphere 9.0; "none" means neither.
	HostCertificate string `json:"host_certificate"`
	HostThumbprint  string `json:"host_thumbprint"`
	// DescriptorError and DescriptorWarning are faults that CreateDescriptor reports.
	DescriptorError   string `json:"descriptor_error"`
	DescriptorWarning string `json:"descriptor_warning"`
	// ImportWarning is a fault that CreateImportSpec reports as a warning.
	ImportWarning string `json:"import_warning"`
	// Manifest is "absent", "wrong" or "zero_size" for a faulty lease manifest. UploadManifest is the same for imports, or
	// "correct"; "" means that of exports.
	Manifest       string `json:"manifest"`
	UploadManifest string `json:"upload_manifest"`
	// Consolidate makes the disks need consolidation after the removal of a snapshot.
	Consolidate bool `json:"consolidate"`
	// Locked lets a consolidation succeed without an effect, as with a disk that another program has attached.
	Locked bool `json:"locked"`
	// SnapshotTask is the fault of the CreateSnapshotEx task.
	SnapshotTask string `json:"snapshot_task"`
	// LeaseLocks refuses to switch on a VM that has a lease.
	LeaseLocks bool `json:"lease_locks"`
	// Move is what happens when a VM with a lease moves to another host. "" ends the lease, and "lives" keeps it.
	// A fault refuses the move.
	Move string `json:"move"`
	// MaxDisk is the largest disk in bytes that a datastore can have; 0 means 62 TiB.
	MaxDisk int64 `json:"max_disk"`
	// Exclusive gives a VM only one lease at a time.
	Exclusive bool `json:"exclusive"`
	// EscapeNames escapes the special characters in names of snapshots, as vSphere does in names of other objects.
	EscapeNames bool `json:"escape_names"`
	// Unquiesced ignores the quiescing of a snapshot silently.
	Unquiesced bool `json:"unquiesced"`
	// QuiesceTask is the same, but only for requests with quiescing.
	QuiesceTask string `json:"quiesce_task"`
	// NeverReady keeps a lease in its initial state. LeaseError is a fault that ends a lease at once.
	NeverReady bool   `json:"never_ready"`
	LeaseError string `json:"lease_error"`
	// LeaseTimeout is how many seconds a lease lives without a Progress call; 0 means 300.
	LeaseTimeout int32 `json:"lease_timeout"`
	// Thumbprint replaces the thumbprint in the lease.
	Thumbprint *string `json:"thumbprint"`
	// Certificate is the host's certificate as PEM, which leases contain since vSphere 9.0.
	Certificate string `json:"certificate"`
	// AnyHost replaces the host in the URLs by "*", like a standalone ESXi host.
	AnyHost bool `json:"any_host"`
	// PlainKeys names devices like govmomi (disk:0), not like the real product (ParaVirtualSCSIController0:0).
	PlainKeys bool `json:"plain_keys"`
	// Omit is a file that the lease omits.
	Omit string `json:"omit"`
	// OneFile sends an empty body for all files of a lease but the first one that is read.
	OneFile bool `json:"one_file"`
	// BodyEnd is how bodies end, if not with a last chunk: "no_last_chunk", "close" for a body without chunks and length,
	// "no_last_chunk_cut" and "close_cut" for the same without TLS's close_notify.
	BodyEnd string `json:"body_end"`
	// Get is a fault of downloads, Put is a fault of uploads.
	Get *getFault `json:"get"`
	Put *getFault `json:"put"`
}

// callFault is the fault of a method. In JSON it is a name, or an object.
type callFault struct {
	Fault string `json:"fault"`
	// Times is how many calls have the fault; 0 means all.
	Times int `json:"times"`
	used  int
}

// UnmarshalJSON accepts a name instead of an object.
func (f *callFault) UnmarshalJSON(data []byte) error {
	if json.Unmarshal(data, &f.Fault) == nil {
		return nil
	}
	type plain callFault
	return json.Unmarshal(data, (*plain)(f))
}

// callFault returns the name of the fault of a call, and counts it. It is empty without a fault.
func (w *world) callFault(method string) string {
	w.mu.Lock()
	defer w.mu.Unlock()
	it := w.faults.Calls[method]
	if it == nil || (it.Times > 0 && it.used >= it.Times) {
		return ""
	}
	it.used++
	return it.Fault
}

// getFault is a fault of the data stream of one file or of all files.
type getFault struct {
	// File is the base name; "" means all files.
	File string `json:"file"`
	// Times is how many transfers have the fault; 0 means all.
	Times int `json:"times"`
	// Status is an HTTP status that replaces the data.
	Status int `json:"status"`
	// NeedsCookie returns status 403 for a GET without the session's cookie.
	NeedsCookie bool `json:"needs_cookie"`
	// Do is an action after At bytes: "cut" the connection, "end" the body properly, "stall", or "expire" the lease.
	// It may also be an event of strike: restart, delete, unsnap, migrate, maintenance or evacuate. The event then cuts
	// the connection.
	// The event logout does not cut the connection. Neither does "silence", a pause of Seconds.
	// The answer to an upload with the fault "late" comes after Seconds.
	Seconds float64 `json:"seconds"`
	Do      string  `json:"do"`
	At      int64   `json:"at"`
}

// world is the simulator with the added features, and a record of the clients' requests.
type world struct {
	service    *simulator.Service
	registry   *simulator.Registry
	thumbprint string
	// address is the host:port of the simulator, once it listens.
	address string

	mu     sync.Mutex
	faults faults
	// healed is closed when the faults are replaced, so that hanging requests continue.
	healed chan struct{}
	leases map[string]*lease
	calls  map[string]int
	gets   []get
	puts   []put
	// sessions contains the registries of the sessions that made a call, by session key.
	sessions map[string]*simulator.Registry
	// nvram contains the nvram of each VM, by the VM's id.
	nvram map[string][]byte
}

// get is one GET of a file of a lease.
type get struct {
	File   string `json:"file"`
	Bytes  int64  `json:"bytes"`
	Cookie bool   `json:"cookie"`
	// Refused is whether the request lacked a necessary cookie.
	Refused bool `json:"refused,omitempty"`
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

// now returns the active faults, and a channel that is closed when they are replaced.
func (w *world) now() (faults, <-chan struct{}) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.faults, w.healed
}

// intercept runs before every call. It returns a fault or registers another receiver for the call.
func (w *world) intercept(ctx *simulator.Context, method *simulator.Method) (mo.Reference, types.BaseMethodFault) {
	w.mu.Lock()
	w.calls[method.Name]++
	if ctx.Session != nil {
		w.sessions[ctx.Session.Key] = ctx.Session.Registry
	}
	w.mu.Unlock()
	if name := w.callFault(method.Name); name != "" {
		return nil, newFault(name)
	}
	if fault := w.denied(method); fault != nil {
		return nil, fault
	}
	if now, _ := w.now(); now.LeaseLocks && method.Name == "PowerOnVM_Task" && w.isLeased(method.This) {
		return nil, new(types.InvalidState)
	}
	if method.Name == "RelocateVM_Task" && w.isLeased(method.This) {
		if fault := w.movesLeased(method.This); fault != nil {
			return nil, fault
		}
	}
	w.stepInto(ctx, method)
	if method.This.Type == "HttpNfcLease" {
		if method.Name == "HttpNfcLeaseAbort" {
			settle(w.undo(method.This.Value))
		}
		return nil, w.leaseCall(method)
	}
	return nil, nil
}

// stepInto registers a receiver in the session, where calls search first. Other code still finds the simulator's object.
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

// newFault returns the fault with a name like "TaskInProgress". Its references point to an arbitrary task.
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

// handler adds the data streams and the control interface to the simulator's paths.
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
	mux.HandleFunc("POST /control/strike", w.takeStrike)
	mux.HandleFunc("GET /control/state", w.state)
	return mux
}

// setFaults replaces all faults.
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

// state returns the clients' requests since the start, and the present snapshots and leases.
func (w *world) state(rw http.ResponseWriter, _ *http.Request) {
	var names []string
	own := apart(w.service.Context)
	for _, each := range w.registry.All("VirtualMachine") {
		vm := each.(*simulator.VirtualMachine)
		own.WithLock(vm, func() { // a task may change the snapshots
			if vm.Snapshot != nil {
				names = append(names, snapshotNames(vm.Snapshot.RootSnapshotList)...)
			}
		})
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
	if now.EscapeNames {
		req.Name = strings.NewReplacer("%", "%25", "/", "%2f", "\\", "%5c").Replace(req.Name)
	}
	if now.Unquiesced {
		req.QuiesceSpec = nil
	}
	if name == "" {
		return m.VirtualMachine.CreateSnapshotExTask(ctx, req)
	}
	return failedSnapshot(ctx, m.VirtualMachine, newFault(name))
}

// baseName returns the last part of a datastore path.
func baseName(path string) string {
	return path[strings.LastIndex(path, "/")+1:]
}
