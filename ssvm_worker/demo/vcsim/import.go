package main

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"path"
	"strings"
	"time"

	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/types"
)

// put is one upload to a file of a lease. Length is -1 if the client did not send it.
type put struct {
	File   string `json:"file"`
	Method string `json:"method"`
	Length int64  `json:"length"`
	Bytes  int64  `json:"bytes"`
}

// pool is a resource pool whose imports behave like the real product's. It stores the uploads.
// An import leaves no VM if it is aborted or its lease expires.
type pool struct {
	*simulator.ResourcePool
	world *world
}

// ImportVApp creates a VM and opens a lease on it.
func (p *pool) ImportVApp(ctx *simulator.Context, req *types.ImportVApp) soapFault {
	now, _ := p.world.now()
	if now.NoDrs != "" && req.Host == nil && p.Owner.Type == "ClusterComputeResource" {
		fault := newFault(now.NoDrs)
		return &methods.ImportVAppBody{Fault_: simulator.Fault("a host is necessary", fault)}
	}
	res := p.ResourcePool.ImportVApp(ctx, req)
	body, ok := res.(*methods.ImportVAppBody)
	if !ok || body.Res == nil {
		return res
	}
	it := ctx.Session.Get(body.Res.Returnval).(*simulator.HttpNfcLease)
	if !settled(ctx, it) {
		return res
	}
	p.world.dressImport(it, now)
	p.world.watch(ctx, it, now)
	p.world.undoWhenLost(ctx, it)
	switch {
	case now.NeverReady:
		change(ctx, it, types.HttpNfcLeaseStateInitializing, nil)
	case now.LeaseError != "":
		p.world.undo(it.Self.Value)
		change(ctx, it, types.HttpNfcLeaseStateError, newFault(now.LeaseError))
	}
	return res
}

// settled waits for the simulator's task that creates the VM, and returns whether it succeeded.
// The task sets the lease's state before its info, under the lock and with the call's context.
// A lock does not exclude its own context, so this function needs another one.
func settled(ctx *simulator.Context, it *simulator.HttpNfcLease) bool {
	own := apart(ctx)
	for range 300_000 {
		state := types.HttpNfcLeaseStateInitializing
		own.WithLock(it, func() { state = it.State })
		if state != types.HttpNfcLeaseStateInitializing {
			return state == types.HttpNfcLeaseStateReady
		}
		time.Sleep(time.Millisecond)
	}
	return false
}

func (w *world) dressImport(it *simulator.HttpNfcLease, now faults) {
	it.Info.LeaseTimeout = leaseTimeout
	if now.LeaseTimeout != 0 {
		it.Info.LeaseTimeout = now.LeaseTimeout
	}
	for number := range it.Info.DeviceUrl {
		each := &it.Info.DeviceUrl[number]
		each.SslThumbprint, each.SslCertificate = w.thumbprint, now.Certificate
		if now.Thumbprint != nil {
			each.SslThumbprint = *now.Thumbprint
		}
	}
}

// undoWhenLost registers the removal of the VM for the case that the lease does not complete.
func (w *world) undoWhenLost(ctx *simulator.Context, it *simulator.HttpNfcLease) {
	own := apart(ctx)
	vm := it.Info.Entity
	w.mu.Lock()
	defer w.mu.Unlock()
	w.leases[it.Self.Value].undo = func() string {
		found, ok := own.Map.Get(vm).(*simulator.VirtualMachine)
		if !ok {
			return ""
		}
		directory := w.directoryOf(found)
		found.DestroyTask(own, &types.Destroy_Task{This: vm})
		return directory
	}
}

// settle waits until a directory is gone: the real product deletes the files of a VM before it answers.
func settle(directory string) {
	for range 300_000 {
		if _, err := os.Stat(directory); directory == "" || err != nil {
			return
		}
		time.Sleep(time.Millisecond)
	}
}

// directoryOf returns the local directory of a VM.
func (w *world) directoryOf(vm *simulator.VirtualMachine) string {
	var place object.DatastorePath
	if !place.FromString(vm.Config.Files.LogDirectory) || place.Path == "" {
		return ""
	}
	for _, found := range w.registry.All("Datastore") {
		if store := found.(*simulator.Datastore); store.Name == place.Datastore {
			return path.Join(store.Summary.Url, place.Path)
		}
	}
	return ""
}

// undo starts the removal of the VM of an import's lease, and returns its directory. It ignores the leases of exports.
func (w *world) undo(id string) string {
	w.mu.Lock()
	var undo func() string
	if mine := w.leases[id]; mine != nil {
		undo, mine.undo = mine.undo, nil
	}
	w.mu.Unlock()
	if undo == nil {
		return ""
	}
	return undo()
}

// takeData stores an upload at the path that an export of the new VM reads.
func (w *world) takeData(rw http.ResponseWriter, r *http.Request) {
	parts := strings.Split(r.URL.Path, "/")
	id, file := parts[len(parts)-2], parts[len(parts)-1]
	mine, spoilt, number := w.beginPut(id, file, r)
	if mine == nil {
		http.NotFound(rw, r)
		return
	}
	if spoilt.Status != 0 {
		http.Error(rw, "spoilt", spoilt.Status)
		return
	}
	place, err := w.placeOf(mine.vm, file)
	if err != nil {
		http.Error(rw, err.Error(), http.StatusNotFound)
		return
	}
	stored, err := os.Create(place)
	if err != nil {
		http.Error(rw, err.Error(), http.StatusInternalServerError)
		return
	}
	defer stored.Close()
	sums := w.summing(mine, file, "")
	wire := &wire{world: w, lease: mine, sums: sums, spoilt: spoilt, healed: w.healed, gone: r.Context().Done()}
	n, err := io.Copy(&taken{stored, wire}, r.Body)
	w.mu.Lock()
	w.puts[number].Bytes = n
	w.mu.Unlock()
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	if spoilt.Do == "late" {
		select {
		case <-wire.healed:
		case <-r.Context().Done():
		case <-time.After(time.Duration(spoilt.Seconds * float64(time.Second))):
		}
	}
	rw.WriteHeader(http.StatusCreated)
}

func (w *world) beginPut(id, file string, r *http.Request) (*lease, getFault, int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	mine := w.leases[id]
	if mine == nil || mine.outcome != "open" {
		return nil, getFault{}, 0
	}
	w.puts = append(w.puts, put{File: file, Method: r.Method, Length: r.ContentLength})
	fault := w.faults.Put
	if fault == nil || (fault.File != "" && fault.File != file) || fault.Times < 0 {
		return mine, getFault{}, len(w.puts) - 1
	}
	spoilt := *fault
	if fault.Times--; spoilt.Times == 0 {
		fault.Times = 0 // no limit
	} else if fault.Times == 0 {
		fault.Times = -1 // used up
	}
	return mine, spoilt, len(w.puts) - 1
}

// taken writes to a file and executes the fault of its wire.
type taken struct {
	io.Writer
	wire *wire
}

func (t *taken) Write(data []byte) (int, error) {
	select {
	case <-t.wire.lease.expired:
		panic(http.ErrAbortHandler)
	default:
	}
	t.wire.sent += int64(len(data))
	if do := t.wire.spoilt.Do; do != "" && do != "late" && t.wire.sent > t.wire.spoilt.At {
		if err := t.wire.goWrong(); err != nil {
			return 0, err
		}
	}
	t.wire.sums.add(data)
	return t.Writer.Write(data)
}

// placeOf returns the local file of a VM's disk.
func (w *world) placeOf(vm types.ManagedObjectReference, file string) (string, error) {
	machine, ok := w.registry.Get(vm).(*simulator.VirtualMachine)
	if !ok {
		return "", fmt.Errorf("the VM is gone")
	}
	devices := object.VirtualDeviceList(machine.Config.Hardware.Device)
	for _, each := range devices.SelectByType((*types.VirtualDisk)(nil)) {
		backing, ok := each.GetVirtualDevice().Backing.(types.BaseVirtualDeviceFileBackingInfo)
		if !ok {
			continue
		}
		name := backing.GetVirtualDeviceFileBackingInfo().FileName
		var place object.DatastorePath
		if baseName(name) != file || !place.FromString(name) {
			continue
		}
		for _, found := range w.registry.All("Datastore") {
			if store := found.(*simulator.Datastore); store.Name == place.Datastore {
				return path.Join(store.Summary.Url, place.Path), nil
			}
		}
	}
	return "", fmt.Errorf("the VM has no disk %s", file)
}

// hardware describes the devices like the real product, limited to the data that an import reads.
func hardware(files []types.OvfFile, devices object.VirtualDeviceList) string {
	var items strings.Builder
	item := func(id, kind int, name, more string) {
		fmt.Fprintf(&items, "\n      <Item><rasd:ElementName>%s</rasd:ElementName>%s"+
			"<rasd:InstanceID>%d</rasd:InstanceID><rasd:ResourceType>%d</rasd:ResourceType></Item>", name, more, id, kind)
	}
	item(1, 3, "2 virtual CPUs", "<rasd:VirtualQuantity>2</rasd:VirtualQuantity>")
	item(2, 4, "512 MB of memory", "<rasd:VirtualQuantity>512</rasd:VirtualQuantity>")
	item(3, 6, "SCSI controller 0", "<rasd:ResourceSubType>VirtualSCSI</rasd:ResourceSubType>")
	for number, file := range files {
		item(10+number, 17, fmt.Sprintf("Hard disk %d", number+1), fmt.Sprintf(
			"<rasd:HostResource>ovf:/disk/vmdisk%d</rasd:HostResource><rasd:Parent>3</rasd:Parent>"+
				"<rasd:AddressOnParent>%s</rasd:AddressOnParent>", number, file.DeviceId[strings.LastIndex(file.DeviceId, ":")+1:]))
	}
	for number := range devices.SelectByType((*types.VirtualVmxnet3)(nil)) {
		item(100+number, 10, "Network adapter", "<rasd:Connection>VM Network</rasd:Connection>"+
			"<rasd:ResourceSubType>vmxnet3</rasd:ResourceSubType>")
	}
	return items.String()
}
