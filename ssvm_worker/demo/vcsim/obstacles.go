package main

import (
	"fmt"

	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/types"
)

// obstruct puts a VM into states in which a real vCenter makes no snapshot, or may make none.
// The simulator itself makes one unless a fault, such as SnapshotTask, prevents it.
func obstruct(vm *simulator.VirtualMachine, want wanted) {
	devices := object.VirtualDeviceList(vm.Config.Hardware.Device)
	disk := func() *types.VirtualDiskFlatVer2BackingInfo {
		first := devices.SelectByType((*types.VirtualDisk)(nil))[0].(*types.VirtualDisk)
		return first.Backing.(*types.VirtualDiskFlatVer2BackingInfo)
	}
	for _, state := range want.States {
		switch state {
		case "multi_writer":
			disk().Sharing = "sharingMultiWriter"
		case "no_sharing":
			disk().Sharing = "sharingNone" // what a real vCenter gives for every disk
		case "shared_bus":
			for _, each := range devices.SelectByType((*types.ParaVirtualSCSIController)(nil)) {
				each.(*types.ParaVirtualSCSIController).SharedBus = "physicalSharing"
			}
		case "passthrough":
			device := &types.VirtualPCIPassthrough{VirtualDevice: types.VirtualDevice{Key: 13000}}
			vm.Config.Hardware.Device = append(vm.Config.Hardware.Device, device)
			vm.Runtime.PowerState = types.VirtualMachinePowerStatePoweredOn
		case "ft_primary", "ft_secondary":
			role := map[string]int32{"ft_primary": 1, "ft_secondary": 2}[state]
			vm.Config.FtInfo = &types.FaultToleranceConfigInfo{Role: role}
		case "managed":
			vm.Config.ManagedBy = &types.ManagedByInfo{ExtensionKey: "com.vmware.vcHms", Type: "replica"}
		case "locked":
			vm.Config.Flags.SnapshotLocked = types.NewBool(true)
		case "disabled":
			vm.DisabledMethod = []string{"CreateSnapshotEx_Task", "RevertToSnapshot_Task"}
		case "some_disabled":
			vm.DisabledMethod = []string{"PowerOnVM_Task", "AcquireTicket"}
		case "disconnected":
			vm.Runtime.ConnectionState = types.VirtualMachineConnectionStateDisconnected
		}
	}
	var trees []types.VirtualMachineSnapshotTree
	for level := want.Levels; level > 0; level-- {
		ref := types.ManagedObjectReference{Type: "VirtualMachineSnapshot", Value: fmt.Sprintf("%s-%d", vm.Self.Value, level)}
		tree := types.VirtualMachineSnapshotTree{Snapshot: ref, Vm: vm.Self, Name: ref.Value, State: "poweredOff", ChildSnapshotList: trees}
		trees = []types.VirtualMachineSnapshotTree{tree}
		if vm.Snapshot == nil {
			vm.Snapshot = &types.VirtualMachineSnapshotInfo{CurrentSnapshot: &ref}
		}
		vm.Snapshot.RootSnapshotList = trees
	}
}
