package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"

	"github.com/vmware/govmomi/find"
	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/types"
)

// wanted is the request for a new VM of a test or the demo.
type wanted struct {
	Name  string `json:"name"`
	Disks []struct {
		// Capacity in bytes.
		Capacity int64 `json:"capacity"`
		// Mode is persistent, independent_persistent, … or rdm for a raw device in physical mode.
		Mode string `json:"mode"`
		// ChangeID is the change id of changed block tracking.
		ChangeID string `json:"change_id"`
	} `json:"disks"`
	// Nvram is the content of the nvram file. If it is empty, the VM has no such file.
	Nvram []byte `json:"nvram"`
	// States are the names of states in which vSphere makes no snapshot, or may make none. See obstruct.
	States []string `json:"states"`
	// Network is "distributed" or "opaque" for an adapter that is not on a standard switch.
	Network string `json:"network"`
	// Pool is the name of its cluster or host; "" means a standalone host.
	Pool string `json:"pool"`
	// Levels is the length of its chain of snapshots.
	Levels int `json:"levels"`
	// Firmware is "bios" or "efi".
	Firmware string `json:"firmware"`
	// Encrypted gives the VM an encryption key. TPM gives it a virtual TPM.
	Encrypted bool `json:"encrypted"`
	TPM       bool `json:"tpm"`
}

// made contains the names of the new VM, and the paths for the content of its disks.
type made struct {
	ID           string     `json:"id"`
	InstanceUUID string     `json:"instance_uuid"`
	Path         string     `json:"path"`
	Datacenter   string     `json:"datacenter"`
	Disks        []madeDisk `json:"disks"`
}

type madeDisk struct {
	Key   int32  `json:"key"`
	Label string `json:"label"`
	// File is a datastore path: [LocalDS_0] name/disk-0.vmdk.
	File string `json:"file"`
}

func (w *world) addMachine(rw http.ResponseWriter, r *http.Request) {
	var want wanted
	err := json.NewDecoder(r.Body).Decode(&want)
	if err == nil {
		var it *made
		if it, err = w.makeMachine(r.Context(), want); err == nil {
			_ = json.NewEncoder(rw).Encode(it)
			return
		}
	}
	http.Error(rw, err.Error(), http.StatusBadRequest)
}

func (w *world) makeMachine(ctx context.Context, want wanted) (*made, error) {
	finder := find.NewFinder(w.client(), false)
	datacenter, err := finder.DefaultDatacenter(ctx)
	if err != nil {
		return nil, err
	}
	finder.SetDatacenter(datacenter)
	pattern := "*"
	if want.Pool != "" {
		pattern = want.Pool + "/Resources"
	}
	pools, err := finder.ResourcePoolList(ctx, pattern)
	if err != nil {
		return nil, err
	}
	folder, err := finder.DefaultFolder(ctx)
	if err != nil {
		return nil, err
	}
	task, err := folder.CreateVM(ctx, specification(want), pools[0], nil)
	if err != nil {
		return nil, err
	}
	info, err := task.WaitForResult(ctx, nil)
	if err != nil {
		return nil, err
	}
	ref := info.Result.(types.ManagedObjectReference)
	vm := w.registry.Get(ref).(*simulator.VirtualMachine)
	it := &made{ID: ref.Value, InstanceUUID: vm.Config.InstanceUuid, Datacenter: datacenter.Name()}
	it.Path = folder.InventoryPath + "/" + want.Name
	it.Disks = setModes(vm, want)
	w.addSecrets(vm, want)
	obstruct(vm, want)
	w.connect(vm, want.Network)
	return it, nil
}

func (w *world) addSecrets(vm *simulator.VirtualMachine, want wanted) {
	if len(want.Nvram) > 0 {
		w.mu.Lock()
		w.nvram[vm.Self.Value] = want.Nvram
		w.mu.Unlock()
	}
	if want.Encrypted {
		vm.Config.KeyId = &types.CryptoKeyId{KeyId: "key-1"}
	}
	if want.TPM {
		tpm := &types.VirtualTPM{VirtualDevice: types.VirtualDevice{Key: 11000}}
		vm.Config.Hardware.Device = append(vm.Config.Hardware.Device, tpm)
	}
}

func (w *world) references(kind string) []types.ManagedObjectReference {
	var found []types.ManagedObjectReference
	for _, each := range w.registry.All(kind) {
		found = append(found, each.Reference())
	}
	return found
}

// connect gives the adapter the backing and the summary that a real vCenter gives.
func (w *world) connect(vm *simulator.VirtualMachine, network string) {
	devices := object.VirtualDeviceList(vm.Config.Hardware.Device)
	card := devices.SelectByType((*types.VirtualVmxnet3)(nil))[0].GetVirtualDevice()
	switch network {
	case "distributed":
		group := w.registry.FindByName("DC0_DVPG0", w.references("DistributedVirtualPortgroup")).Reference().Value
		card.Backing = &types.VirtualEthernetCardDistributedVirtualPortBackingInfo{
			Port: types.DistributedVirtualSwitchPortConnection{SwitchUuid: "50 2a", PortgroupKey: group},
		}
		card.DeviceInfo = &types.Description{Label: "Network adapter 1", Summary: "DVSwitch: 50 2a 1f"}
	case "opaque":
		card.Backing = &types.VirtualEthernetCardOpaqueNetworkBackingInfo{
			OpaqueNetworkId: "segment-1", OpaqueNetworkType: "nsx.LogicalSwitch",
		}
		card.DeviceInfo = &types.Description{Label: "Network adapter 1", Summary: "nsx.LogicalSwitch: segment-1"}
	}
}

func specification(want wanted) types.VirtualMachineConfigSpec {
	var devices object.VirtualDeviceList
	controller, _ := devices.CreateSCSIController("pvscsi")
	network := &types.VirtualEthernetCardNetworkBackingInfo{
		VirtualDeviceDeviceBackingInfo: types.VirtualDeviceDeviceBackingInfo{DeviceName: "VM Network"},
	}
	card, _ := devices.CreateEthernetCard("vmxnet3", network)
	devices = append(devices, controller, card)
	for number, each := range want.Disks {
		file := fmt.Sprintf("[LocalDS_0] %s/disk-%d.vmdk", want.Name, number)
		disk := devices.CreateDisk(controller.(types.BaseVirtualController), types.ManagedObjectReference{}, file)
		disk.CapacityInBytes = each.Capacity
		disk.CapacityInKB = each.Capacity / 1024
		unit := int32(number)
		disk.UnitNumber = &unit
		devices = append(devices, disk)
	}
	spec := types.VirtualMachineConfigSpec{
		Name: want.Name, GuestId: "otherLinux64Guest", Firmware: want.Firmware, NumCPUs: 2, MemoryMB: 512,
		Files: &types.VirtualMachineFileInfo{VmPathName: "[LocalDS_0]"},
	}
	spec.DeviceChange, _ = devices.ConfigSpec(types.VirtualDeviceConfigSpecOperationAdd)
	return spec
}

// setModes sets the mode of each disk. The simulator stores the mode but ignores it.
func setModes(vm *simulator.VirtualMachine, want wanted) []madeDisk {
	var disks []madeDisk
	for _, device := range vm.Config.Hardware.Device {
		disk, ok := device.(*types.VirtualDisk)
		if !ok {
			continue
		}
		backing := disk.Backing.(*types.VirtualDiskFlatVer2BackingInfo)
		disks = append(disks, madeDisk{disk.Key, disk.DeviceInfo.GetDescription().Label, backing.FileName})
		backing.ChangeId = want.Disks[len(disks)-1].ChangeID
		switch mode := want.Disks[len(disks)-1].Mode; mode {
		case "":
		case "rdm":
			disk.Backing = &types.VirtualDiskRawDiskMappingVer1BackingInfo{
				VirtualDeviceFileBackingInfo: backing.VirtualDeviceFileBackingInfo,
				CompatibilityMode:            "physicalMode",
				DiskMode:                     "independent_persistent",
			}
		default:
			backing.DiskMode = mode
		}
	}
	return disks
}
