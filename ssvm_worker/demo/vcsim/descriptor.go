package main

import (
	"fmt"
	"html"
	"strings"

	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/types"
)

// ovfManager adds CreateDescriptor to the simulator's OvfManager.
type ovfManager struct {
	simulator.OvfManager
	world *world
}

func (w *world) addDescriptor() {
	ref := *w.service.Context.Map.Get(serviceInstance).(*simulator.ServiceInstance).Content.OvfManager
	manager := &ovfManager{world: w}
	manager.Self = ref
	w.registry.Put(manager)
}

var serviceInstance = types.ManagedObjectReference{Type: "ServiceInstance", Value: "ServiceInstance"}

// CreateDescriptor describes the given snapshot, or the VM without one, with the given files and sizes.
func (m *ovfManager) CreateDescriptor(ctx *simulator.Context, req *types.CreateDescriptor) soapFault {
	body := new(methods.CreateDescriptorBody)
	vm, ok := ctx.Map.Get(req.Obj).(*simulator.VirtualMachine)
	if !ok {
		body.Fault_ = simulator.Fault("no such VM", &types.ManagedObjectNotFound{Obj: req.Obj})
		return body
	}
	devices, of := object.VirtualDeviceList(vm.Config.Hardware.Device), req.Obj.Value
	if ref := req.Cdp.Snapshot; ref != nil {
		snapshot, ok := ctx.Map.Get(*ref).(*simulator.VirtualMachineSnapshot)
		if !ok || snapshot.Vm != req.Obj {
			body.Fault_ = simulator.Fault("no such snapshot", &types.ManagedObjectNotFound{Obj: *ref})
			return body
		}
		devices, of = snapshot.Config.Hardware.Device, ref.Value
	}
	body.Res = &types.CreateDescriptorResponse{Returnval: types.OvfCreateDescriptorResult{
		OvfDescriptor: descriptor(req.Cdp, vm.Name, of, devices),
	}}
	now, _ := m.world.now()
	body.Res.Returnval.Error = reported(now.DescriptorError)
	body.Res.Returnval.Warning = reported(now.DescriptorWarning)
	return body
}

// maxDisk returns the bytes of the largest disk that a datastore can have: 62 TiB since vSphere 5.5.
func (f *faults) maxDisk() int64 {
	if f.MaxDisk != 0 {
		return f.MaxDisk
	}
	return 62 << 40
}

// CreateImportSpec refuses a disk that is too large for the datastore. It reports the active warning.
func (m *ovfManager) CreateImportSpec(ctx *simulator.Context, req *types.CreateImportSpec) soapFault {
	res := m.OvfManager.CreateImportSpec(ctx, req)
	body, ok := res.(*methods.CreateImportSpecBody)
	if !ok || body.Res == nil {
		return res
	}
	spec, ok := body.Res.Returnval.ImportSpec.(*types.VirtualMachineImportSpec)
	if !ok {
		return res
	}
	now, _ := m.world.now()
	body.Res.Returnval.Warning = reported(now.ImportWarning)
	for _, each := range spec.ConfigSpec.DeviceChange {
		disk, ok := each.GetVirtualDeviceConfigSpec().Device.(*types.VirtualDisk)
		if ok && max(disk.CapacityInBytes, disk.CapacityInKB<<10) > now.maxDisk() {
			body.Res.Returnval.ImportSpec = nil
			body.Res.Returnval.Error = reported("FileTooLarge")
		}
	}
	return res
}

func reported(name string) []types.LocalizedMethodFault {
	if name == "" {
		return nil
	}
	return []types.LocalizedMethodFault{{Fault: newFault(name), LocalizedMessage: name}}
}

const envelope = `<?xml version="1.0" encoding="UTF-8"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1" xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData">
  <References>%s
  </References>
  <DiskSection><Info>Virtual disks</Info>%s
  </DiskSection>
  <NetworkSection><Info>Networks</Info><Network ovf:name="VM Network"/></NetworkSection>
  <VirtualSystem ovf:id="%s"><Info>A virtual machine</Info>
    <AnnotationSection><Info>Made by the simulator</Info><Annotation>of %s</Annotation></AnnotationSection>
    <VirtualHardwareSection><Info>Virtual hardware</Info><System/>%s
    </VirtualHardwareSection>
  </VirtualSystem>
</Envelope>
`

func descriptor(params types.OvfCreateDescriptorParams, name, of string, devices object.VirtualDeviceList) string {
	var files, disks strings.Builder
	for number, file := range params.OvfFiles {
		fmt.Fprintf(&files, "\n    <File ovf:id=\"file%d\" ovf:href=\"%s\" ovf:size=\"%d\"/>",
			number, html.EscapeString(file.Path), file.Size)
		if strings.HasSuffix(file.Path, ".nvram") {
			continue // not a disk
		}
		fmt.Fprintf(&disks, "\n    <Disk ovf:diskId=\"vmdisk%d\" ovf:fileRef=\"file%d\" ovf:capacity=\"%d\" ovf:capacityAllocationUnits=\"byte\"/>",
			number, number, capacity(file, devices))
	}
	if params.Name != "" {
		name = params.Name
	}
	return fmt.Sprintf(envelope, files.String(), disks.String(), html.EscapeString(name), of,
		hardware(params.OvfFiles, devices))
}

// capacity returns the file's capacity, or by default that of the disk whose unit number ends its device id.
func capacity(file types.OvfFile, devices object.VirtualDeviceList) int64 {
	if file.Capacity != 0 {
		return file.Capacity
	}
	for _, each := range devices.SelectByType((*types.VirtualDisk)(nil)) {
		disk := each.(*types.VirtualDisk)
		if strings.HasSuffix(file.DeviceId, fmt.Sprintf(":%d", *disk.UnitNumber)) {
			return disk.CapacityInBytes
		}
	}
	return 0
}
