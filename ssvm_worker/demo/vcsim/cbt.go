package main

import (
	"encoding/json"
	"net/http"
	"sync"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/types"
)

// cbtWindow is how many bytes of the disk one answer of QueryChangedDiskAreas covers.
// A client that does not repeat the query misses changes.
const cbtWindow = 256 << 10

// changes is a new change id of a disk, with the areas that were written since the previous id.
type changes struct {
	VM       string `json:"vm"`
	Disk     int32  `json:"disk"`
	ChangeID string `json:"change_id"`
	// Areas are offsets and lengths in bytes.
	Areas [][2]int64 `json:"areas"`
}

// tracked contains the changes of each disk by VM and key, oldest first.
var tracked = struct {
	sync.Mutex
	disks map[diskName][]changes
}{disks: map[diskName][]changes{}}

type diskName struct {
	vm   string
	disk int32
}

// addChanges sets the next change id of a disk.
func (w *world) addChanges(rw http.ResponseWriter, r *http.Request) {
	var next changes
	if err := json.NewDecoder(r.Body).Decode(&next); err != nil {
		http.Error(rw, err.Error(), http.StatusBadRequest)
		return
	}
	vm, ok := w.registry.Get(types.ManagedObjectReference{Type: "VirtualMachine", Value: next.VM}).(*simulator.VirtualMachine)
	if !ok {
		http.Error(rw, "no such VM", http.StatusNotFound)
		return
	}
	for _, device := range vm.Config.Hardware.Device {
		if disk, ok := device.(*types.VirtualDisk); ok && disk.Key == next.Disk {
			disk.Backing.(*types.VirtualDiskFlatVer2BackingInfo).ChangeId = next.ChangeID
		}
	}
	tracked.Lock()
	defer tracked.Unlock()
	name := diskName{next.VM, next.Disk}
	tracked.disks[name] = append(tracked.disks[name], next)
}

// QueryChangedDiskAreas returns the areas that were written since a change id, or FileFault for an unknown id.
func (m *machine) QueryChangedDiskAreas(_ *simulator.Context, req *types.QueryChangedDiskAreas) soapFault {
	body := new(methods.QueryChangedDiskAreasBody)
	areas, known := changedSince(diskName{m.Self.Value, req.DeviceKey}, req.ChangeId)
	capacity := m.capacity(req.DeviceKey)
	if !known || req.StartOffset >= capacity {
		body.Fault_ = simulator.Fault("", new(types.FileFault))
		return body
	}
	end := min(req.StartOffset+cbtWindow, capacity)
	answer := types.DiskChangeInfo{StartOffset: req.StartOffset, Length: end - req.StartOffset}
	for _, each := range areas {
		first, last := max(each[0], req.StartOffset), min(each[0]+each[1], end)
		if first < last {
			answer.ChangedArea = append(answer.ChangedArea, types.DiskChangeExtent{Start: first, Length: last - first})
		}
	}
	body.Res = &types.QueryChangedDiskAreasResponse{Returnval: answer}
	return body
}

func changedSince(name diskName, id string) (areas [][2]int64, known bool) {
	tracked.Lock()
	defer tracked.Unlock()
	for _, each := range tracked.disks[name] {
		if known {
			areas = append(areas, each.Areas...)
		}
		known = known || each.ChangeID == id
	}
	return areas, known
}

func (m *machine) capacity(key int32) int64 {
	for _, device := range m.Config.Hardware.Device {
		if disk, ok := device.(*types.VirtualDisk); ok && disk.Key == key {
			return disk.CapacityInBytes
		}
	}
	return 0
}
